"""What our binding modules rely on in vLLM; ``test_contract`` checks it."""

VERSION = "0.32.0"

RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
CPU_RUNNER = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
SAMPLER = "vllm.v1.sample.sampler:Sampler"
REJECTION_SAMPLER = "vllm.v1.sample.rejection_sampler:RejectionSampler"
ENGINE = "vllm.v1.engine.async_llm:AsyncLLM"
LAYER_UTILS = "vllm.model_executor.layers.utils"
LINEAR_METHOD = "vllm.model_executor.layers.linear:UnquantizedLinearMethod"
EMBEDDING_METHOD = "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod"
LLAMA = "vllm.model_executor.models.llama:Llama"
QWEN2 = "vllm.model_executor.models.qwen2:Qwen2"
QWEN3 = "vllm.model_executor.models.qwen3:Qwen3"
NGRAM_MATCHER = "vllm.v1.spec_decode.ngram_proposer:_find_longest_matched_ngram_and_propose_tokens"
CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn:CPUAttention"

# Methods of vLLM that classes of ours override: parameters without ``self``.
OVERRIDDEN = {
    "scheduler.vllm_runner:SlipstreamModelRunner": {
        "__init__": "vllm_config device",
        "_get_eagle3_aux_layers_from_config": "",
        "_setup_eagle3_aux_hidden_state_outputs": "",
        "initialize_kv_cache": "kv_cache_config is_profiling kv_cache_allocation_context",
        "_update_states": "scheduler_output",
        "_sample": "logits spec_decode_metadata",
        "_input_fits_in_drafter": "common_attn_metadata",
        "propose_draft_token_ids": "scheduler_output sampled_token_ids sampling_metadata hidden_states "
        "sample_hidden_states aux_hidden_states spec_decode_metadata common_attn_metadata slot_mappings",
        "take_draft_token_ids": "",
    },
    "scheduler.vllm_worker:SlipstreamWorker": {
        "init_device": "",
        "load_model": "load_dummy_weights",
        "determine_available_memory": "",
    },
    "scheduler.vllm_executor:InlineExecutor": {"_init_executor": ""},
    "scheduler.vllm_scheduler:SlipstreamScheduler": {
        "__init__": "vllm_config kv_cache_config structured_output_manager block_size hash_block_size mm_registry "
        "include_finished_set log_stats",
        "schedule": "throttle_prefills",
        "add_request": "request",
        "shutdown": "",
        "update_draft_token_ids": "draft_token_ids",
        "update_from_output": "scheduler_output model_runner_output",
    },
    "scheduler.vllm_async_scheduler:SlipstreamAsyncScheduler": {
        "__init__": "args kwargs",
        "schedule": "throttle_prefills",
        "_update_after_schedule": "scheduler_output",
        "update_from_output": "scheduler_output model_runner_output",
    },
    "scheduler.vllm_sampler:PositionKeyedSampler": {"sample": "logits sampling_metadata logprobs_mode_override"},
    "scheduler.vllm_sampler:PositionKeyedRejectionSampler": {
        "forward": "metadata draft_probs logits sampling_metadata"
    },
    "scheduler.vllm_metrics:SpeculationStatLogger": {
        "__init__": "vllm_config engine_index",
        "record": "scheduler_stats iteration_stats mm_cache_stats engine_idx",
        "log_engine_initialized": "",
    },
}

# What we call: module of ours, vLLM's symbol, number of positional arguments (``self`` included), keywords.
CALLED = [
    ("server.vllm_adapter", "vllm.entrypoints.launchers.app:build_app", 3, ""),
    ("server.vllm_adapter", "vllm.entrypoints.launchers.api_server.app_state:init_app_state", 4, ""),
    ("server.vllm_adapter", "vllm.entrypoints.launchers.cli_args:make_arg_parser", 1, ""),
    ("server.vllm_adapter", "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args", 1, ""),
    ("server.vllm_adapter", f"{ENGINE}.get_supported_tasks", 1, ""),
    ("server.serving", f"{ENGINE}.shutdown", 1, ""),
    ("scheduler.answering", f"{ENGINE}.get_tokenizer", 1, ""),
    ("scheduler.answering", f"{ENGINE}.generate", 4, ""),
    ("scheduler.answering", f"{ENGINE}.collective_rpc", 2, "args"),
    ("scheduler.answering", "vllm:SamplingParams", 0, "temperature max_tokens seed detokenize output_kind"),
    ("scheduler.engine", f"{ENGINE}.from_vllm_config", 1, "stat_loggers"),
    ("scheduler.engine", "vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config", 2, ""),
    ("scheduler.vllm_runner", f"{RUNNER}.get_kv_cache_spec", 1, ""),
    ("scheduler.vllm_runner", "vllm.v1.worker.block_table:MultiGroupBlockTable.__getitem__", 2, ""),
    ("scheduler.vllm_runner", "vllm.v1.worker.block_table:BlockTable.get_device_tensor", 2, ""),
    ("scheduler.vllm_runner", "vllm.v1.outputs:DraftTokenIds", 2, ""),
    ("scheduler.vllm_linear", f"{LAYER_UTILS}:dispatch_cpu_unquantized_gemm", 2, ""),
    ("scheduler.vllm_linear", f"{LAYER_UTILS}:dispatch_cpu_unquantized_gemm", 1, "remove_weight"),
    ("scheduler.vllm_linear", "vllm.logger:init_logger", 1, ""),
    ("scheduler.vllm_decoder", "vllm.logger:init_logger", 1, ""),
    ("scheduler.vllm_decoder", "vllm.forward_context:get_forward_context", 0, ""),
    ("scheduler.vllm_proposer", "vllm.config:ModelConfig.get_vocab_size", 1, ""),
    ("scheduler.vllm_proposer", "vllm.config:ModelConfig.get_hidden_size", 1, ""),
    ("scheduler.vllm_sampler", f"{SAMPLER}", 2, ""),
    ("scheduler.vllm_sampler", f"{SAMPLER}.forward", 3, "predict_bonus_token logprobs_mode_override"),
    ("scheduler.vllm_sampler", f"{SAMPLER}.sample", 4, ""),
    ("scheduler.vllm_sampler", f"{SAMPLER}.greedy_sample", 1, ""),
    ("scheduler.vllm_sampler", f"{SAMPLER}.apply_temperature", 3, ""),
    ("scheduler.vllm_sampler", f"{SAMPLER}.compute_logprobs", 1, ""),
    ("scheduler.vllm_sampler", f"{REJECTION_SAMPLER}", 3, ""),
    ("scheduler.vllm_sampler", f"{REJECTION_SAMPLER}.apply_logits_processors", 4, ""),
    ("scheduler.vllm_sampler", f"{REJECTION_SAMPLER}._get_logprobs_tensors", 7, ""),
    ("scheduler.vllm_sampler", "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p", 3, ""),
    ("scheduler.vllm_sampler", "vllm.v1.outputs:SamplerOutput", 0, "sampled_token_ids logprobs_tensors"),
    ("scheduler.vllm_scheduler", "vllm.v1.spec_decode.metrics:SpecDecodingStats.new", 1, ""),
    ("scheduler.vllm_scheduler", "vllm.v1.spec_decode.metrics:SpecDecodingStats.observe_draft", 3, ""),
    ("scheduler.vllm_calibration", "vllm.v1.request:Request", 4, ""),
    ("scheduler.vllm_calibration", "vllm:SamplingParams", 0, "temperature max_tokens ignore_eos"),
    ("scheduler.vllm_calibration", f"{SCHEDULER}.finish_requests", 3, ""),
    ("scheduler.vllm_repetition", NGRAM_MATCHER, 5, ""),
]

# What we read or set: module of ours, vLLM's class, attributes.
ATTRIBUTES = [
    (
        "scheduler.vllm_runner",
        RUNNER,
        "drafter sampler rejection_sampler speculative_config device model_config max_model_len requests input_batch "
        "input_ids positions kv_caches use_aux_hidden_state_outputs",
    ),
    (
        "scheduler.vllm_runner",
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "num_reqs req_ids generators sampling_metadata block_table num_tokens_no_spec num_computed_tokens_cpu "
        "num_prompt_tokens",
    ),
    (
        "scheduler.vllm_runner",
        "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        "generator sampling_params output_token_ids",
    ),
    ("scheduler.vllm_runner", "vllm.v1.worker.block_table:BlockTable", "block_size slot_mapping"),
    ("scheduler.vllm_runner", "vllm.v1.utils:CpuGpuBuffer", "gpu"),
    ("scheduler.vllm_runner", "vllm.v1.kv_cache_interface:KVCacheConfig", "num_blocks kv_cache_groups"),
    ("scheduler.vllm_runner", "vllm.v1.kv_cache_interface:KVCacheGroupSpec", "kv_cache_spec"),
    ("scheduler.vllm_worker", "vllm.v1.kv_cache_interface:FullAttentionSpec", "block_size page_size_bytes"),
    (
        "scheduler.vllm_runner",
        "vllm.v1.core.sched.output:SchedulerOutput",
        "finished_req_ids scheduled_new_reqs num_scheduled_tokens scheduled_spec_decode_tokens kv_cache_block_copies",
    ),
    ("scheduler.vllm_runner", "vllm.v1.core.sched.output:NewRequestData", "req_id sampling_params"),
    (
        "scheduler.vllm_runner",
        "vllm:SamplingParams",
        "seed max_tokens stop_token_ids eos_token_id temperature top_k top_p sampling_type",
    ),
    ("scheduler.vllm_runner", "vllm.v1.outputs:DraftTokenIds", "req_ids draft_token_ids"),
    ("scheduler.vllm_sampler", SAMPLER, "logprobs_mode use_fp64_gumbel"),
    ("scheduler.vllm_sampler", REJECTION_SAMPLER, "sampler is_processed_logprobs_mode"),
    (
        "scheduler.vllm_sampler",
        "vllm.v1.sample.metadata:SamplingMetadata",
        "all_greedy all_random temperature top_k top_p max_num_logprobs logitsprocs",
    ),
    ("scheduler.vllm_sampler", "vllm.v1.sample.logits_processor:LogitsProcessors", "argmax_invariant"),
    (
        "scheduler.vllm_sampler",
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
        "draft_token_ids num_draft_tokens max_spec_len bonus_logits_indices target_logits_indices",
    ),
    ("scheduler.vllm_sampler", "vllm.v1.outputs:SamplerOutput", "sampled_token_ids logprobs_tensors"),
    ("scheduler.vllm_sampler", "vllm.v1.outputs:LogprobsTensors", "logprobs"),
    (
        "scheduler.vllm_scheduler",
        SCHEDULER,
        "vllm_config num_spec_tokens max_num_running_reqs dynamic_sd_lookup running requests block_size "
        "max_num_scheduled_tokens max_model_len",
    ),
    (
        "scheduler.vllm_scheduler",
        "vllm.v1.request:Request",
        "request_id num_output_tokens num_tokens num_computed_tokens is_prefill_chunk all_token_ids max_tokens "
        "sampling_params cache_salt",
    ),
    ("scheduler.vllm_scheduler", "vllm.v1.core.sched.output:SchedulerOutput", "finished_req_ids"),
    ("scheduler.vllm_calibration", SCHEDULER, "requests"),
    ("scheduler.vllm_async_scheduler", "vllm.v1.request:Request", "spec_token_ids is_prefill_chunk num_tokens"),
    ("scheduler.vllm_async_scheduler", "vllm.v1.core.sched.output:SchedulerOutput", "num_spec_tokens_to_schedule"),
    ("scheduler.vllm_scheduler", "vllm.v1.engine:EngineCoreOutputs", "outputs scheduler_stats"),
    ("scheduler.vllm_scheduler", "vllm.v1.engine:EngineCoreOutput", "request_id new_token_ids"),
    ("scheduler.vllm_scheduler", "vllm.v1.metrics.stats:SchedulerStats", "spec_decoding_stats"),
    ("scheduler.vllm_types", "vllm.v1.metrics.stats:SchedulerStats", "kv_connector_stats"),
    *(
        ("server.request_speculation", f"vllm.entrypoints.{request}", "vllm_xargs")
        for request in (
            "openai.chat_completion.protocol:ChatCompletionRequest",
            "openai.completion.protocol:CompletionRequest",
            "openai.responses.protocol:ResponsesRequest",
            "anthropic.protocol:AnthropicMessagesRequest",
        )
    ),
    ("scheduler.vllm_proposer", "vllm.config:VllmConfig", "additional_config model_config"),
    ("scheduler.vllm_proposer", "vllm.config:ModelConfig", "hf_text_config model seed max_model_len"),
    ("scheduler.vllm_proposer", "vllm.model_executor.models.llama:LlamaForCausalLM", "model lm_head supports_eagle3"),
    ("scheduler.vllm_proposer", "vllm.model_executor.models.llama:LlamaModel", "embed_tokens"),
    *(
        ("scheduler.vllm_decoder", f"{model}{part}", attributes)
        for model in (LLAMA, QWEN2, QWEN3)
        for part, attributes in (
            ("DecoderLayer", "self_attn mlp input_layernorm post_attention_layernorm"),
            ("Attention", "qkv_proj o_proj rotary_emb attn num_heads"),
            ("MLP", "gate_up_proj down_proj act_fn"),
        )
    ),
    ("scheduler.vllm_decoder", f"{QWEN3}Attention", "q_norm k_norm"),
    *(
        ("scheduler.vllm_decoder", f"vllm.model_executor.layers.linear:{kind}ParallelLinear", "tp_size bias")
        for kind in ("QKV", "MergedColumn", "Row")
    ),
    (
        "scheduler.vllm_decoder",
        "vllm.model_executor.layers.layernorm:RMSNorm",
        "weight variance_epsilon variance_size_override",
    ),
    (
        "scheduler.vllm_decoder",
        "vllm.model_executor.layers.rotary_embedding:RotaryEmbedding",
        "cos_sin_cache head_size rotary_dim is_neox_style forward_native forward_cpu",
    ),
    (
        "scheduler.vllm_decoder",
        "vllm.model_executor.layers.attention:Attention",
        "layer_name impl attn_type kv_sharing_target_layer_name kv_cache kv_cache_torch_dtype",
    ),
    (
        "scheduler.vllm_decoder",
        f"{CPU_ATTENTION}BackendImpl",
        "scale sliding_window logits_soft_cap alibi_slopes sinks",
    ),
    ("scheduler.vllm_decoder", f"{CPU_ATTENTION}Metadata", "slot_mapping block_table seq_lens query_start_loc causal"),
    ("scheduler.vllm_decoder", "vllm.forward_context:ForwardContext", "attn_metadata"),
    ("scheduler.vllm_decoder", "vllm.config:VllmConfig", "kv_transfer_config"),
    ("scheduler.vllm_worker", "vllm.v1.worker.cpu_worker:CPUWorker", "model_runner vllm_config"),
    ("scheduler.vllm_worker", "vllm.config:VllmConfig", "additional_config"),
    ("scheduler.answering", ENGINE, "model_config"),
    ("scheduler.answering", "vllm.outputs:RequestOutput", "outputs"),
    ("scheduler.answering", "vllm.outputs:CompletionOutput", "text token_ids"),
    ("scheduler.answering", "vllm.sampling_params:RequestOutputKind", "FINAL_ONLY"),
]

# Statements of vLLM that our code is built around: module of ours, vLLM's function, code it must hold, and why.
BEHAVIOURS = [
    *(
        (
            "server.request_speculation",
            f"vllm.entrypoints.openai.{request}.to_sampling_params",
            "extra_args: dict[str, Any] = self.vllm_xargs if self.vllm_xargs else {}",
            "carries vllm_xargs to the engine",
        )
        for request in (
            "chat_completion.protocol:ChatCompletionRequest",
            "completion.protocol:CompletionRequest",
            "responses.protocol:ResponsesRequest",
        )
    ),
    (
        "scheduler.vllm_metrics",
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        "if custom_stat_loggers is not None: stat_logger_factories.extend(custom_stat_loggers) "
        "if enable_default_loggers",
        "lets our logger see the statistics before vLLM's own",
    ),
    (
        "scheduler.vllm_types",
        "vllm.v1.metrics.stats:SchedulerStats",
        "kv_connector_stats: dict[str, Any] | None = None",
        "sends anything in this dictionary",
    ),
    (
        "server.metrics",
        "vllm.v1.metrics.prometheus:get_prometheus_registry",
        "return REGISTRY",
        "exposes the registry that we register in",
    ),
    ("scheduler.vllm_runner", f"{RUNNER}.__init__", "self.drafter = create_custom_proposer(", "builds ProposerHost"),
    (
        "scheduler.vllm_proposer",
        "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer",
        "instance = user_class(vllm_config)",
        "builds ProposerHost with the configuration alone",
    ),
    (
        "scheduler.vllm_proposer",
        f"{CPU_RUNNER}.load_model",
        "self.drafter.load_model(self.model)",
        "hands the target over",
    ),
    (
        "scheduler.vllm_runner",
        f"{CPU_RUNNER}.load_model",
        "self._setup_eagle3_aux_hidden_state_outputs()",
        "turns hidden states on",
    ),
    (
        "scheduler.vllm_runner",
        f"{RUNNER}._setup_eagle3_aux_hidden_state_outputs",
        "aux_layers = self._get_eagle3_aux_layers_from_config()",
        "asks which hidden states to hand over",
    ),
    (
        "scheduler.vllm_runner",
        f"{RUNNER}.sample_tokens",
        "propose_draft_token_ids(valid_sampled_token_ids)",
        "drafts after bookkeeping, from lists of accepted tokens",
    ),
    (
        "scheduler.vllm_runner",
        f"{RUNNER}._bookkeeping_sync",
        "start_idx = self.input_batch.num_tokens_no_spec[req_idx] end_idx = start_idx + num_sampled_ids",
        "counts the tokens that a step emits into num_tokens_no_spec, the position that the next step samples",
    ),
    (
        "scheduler.vllm_runner",
        "vllm.v1.worker.gpu_input_batch:InputBatch.add_request",
        "if sampling_params.sampling_type == SamplingType.GREEDY: self.temperature_cpu[req_index] = 0.0",
        "tells greedy requests from sampled ones by their type",
    ),
    (
        "scheduler.vllm_runner",
        f"{RUNNER}.sample_tokens",
        "input_fits_in_drafter = self._input_fits_in_drafter(spec_decode_common_attn_metadata)",
        "asks us before it skips the drafter",
    ),
    (
        "scheduler.vllm_runner",
        f"{RUNNER}._get_draft_token_ids_cpu",
        "if isinstance(self._draft_token_ids, list): return",
        "passes drafts of different lengths on",
    ),
    (
        "scheduler.vllm_runner",
        "vllm.v1.worker.utils:copy_kv_cache_blocks_inplace",
        "kernel_blocks_per_block, remainder = divmod(cache.shape[0], num_blocks)",
        "copies pages along the first axis of every cache tensor",
    ),
    (
        "scheduler.vllm_platform",
        "vllm.v1.worker.cpu_worker:CPUWorker.init_device",
        "self.model_runner = CPUModelRunner(self.vllm_config,",
        "looks its runner up by a module-level name",
    ),
    (
        "scheduler.vllm_platform",
        "vllm.v1.worker.gpu_worker:Worker._make_model_runner",
        "from vllm.v1.worker.gpu_model_runner import GPUModelRunner as GPUModelRunnerV1",
        "looks its runner up when it is built",
    ),
    (
        "scheduler.vllm_scheduler",
        f"{SCHEDULER}.schedule",
        "self.dynamic_sd_lookup[len(num_scheduled_tokens)]",
        "reads the table by the number of scheduled requests",
    ),
    *(
        (
            "scheduler.vllm_linear",
            f"{method}.process_weights_after_loading",
            "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm "
            f"dispatch_cpu_unquantized_gemm(layer, remove_weight={removed})",
            f"looks the function up for every {layer} and {'lets its weight go' if removed else 'needs its weight'}",
        )
        for method, layer, removed in ((LINEAR_METHOD, "layer", True), (EMBEDDING_METHOD, "embedding", False))
    ),
    (
        "scheduler.vllm_linear",
        f"{LAYER_UTILS}:dispatch_cpu_unquantized_gemm",
        "layer.cpu_linear = lambda x, weight, bias:",
        "gives each layer a function of input, weight and bias",
    ),
    (
        "scheduler.vllm_linear",
        f"{LAYER_UTILS}:cpu_unquantized_gemm",
        "return layer.cpu_linear(x, weight, bias)",
        "calls that function",
    ),
    *(
        (
            "scheduler.vllm_decoder",
            f"{model}DecoderLayer.forward",
            "def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None) "
            "-> tuple[torch.Tensor, torch.Tensor]: "
            "if residual is None: residual = hidden_states hidden_states = self.input_layernorm(hidden_states) "
            "else: hidden_states, residual = self.input_layernorm(hidden_states, residual) "
            "hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states) "
            "hidden_states, residual = self.post_attention_layernorm(hidden_states, residual) "
            "hidden_states = self.mlp(hidden_states) return (hidden_states, residual)",
            "does nothing but what ops.decoder_layer does",
        )
        for model in (LLAMA, QWEN2, QWEN3)
    ),
    *(
        (
            "scheduler.vllm_decoder",
            f"{model}Attention.forward",
            f"{norms}q, k = self.rotary_emb(positions, q, k) attn_output = self.attn(q, k, v) "
            "output, _ = self.o_proj(attn_output) return output",
            "turns queries and keys and projects what attention gives",
        )
        for model, norms in (
            (LLAMA, "q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1) "),
            (QWEN2, "k = k.view(total_tokens, self.kv_size) "),
            (QWEN3, "k_by_head = self.k_norm(k_by_head) k = k_by_head.view(k.shape) "),
        )
    ),
    *(
        (
            "scheduler.vllm_decoder",
            f"{model}Model.forward",
            "hidden_states, residual = layer(positions, hidden_states, residual",
            "calls every layer with these arguments and has it leave the sum to the next",
        )
        for model in (LLAMA, QWEN2)
    ),
    (
        "scheduler.vllm_decoder",
        "vllm.model_executor.models.interfaces:EagleModelMixin._maybe_add_hidden_state",
        "hidden_states + residual if residual is not None else hidden_states",
        "takes the residual stream from the two results of a layer",
    ),
    (
        "scheduler.vllm_decoder",
        f"{CPU_ATTENTION}BackendImpl.forward",
        "num_blocks, num_kv_heads, block_size, _ = kv_cache.size() "
        "kv_cache = kv_cache.view((num_blocks, num_kv_heads, block_size * 2, -1))",
        "has pages [pages, kv_heads, page_size, 2 * head_dim]",
    ),
    (
        "scheduler.vllm_decoder",
        f"{CPU_ATTENTION}BackendImpl.forward",
        "if attn_metadata is None: return output",
        "computes nothing while vLLM warms up",
    ),
    (
        "scheduler.vllm_decoder",
        f"{CPU_ATTENTION}Backend.supported_kv_cache_layouts",
        "return (KVCacheLayout.LBHNC,)",
        "lets each page of a layer lie in one piece",
    ),
    (
        "scheduler.vllm_decoder",
        "vllm.model_executor.layers.attention.attention:get_attention_context",
        "attn_metadata = attn_metadata_raw[layer_name]",
        "finds a step's metadata by the layer's name",
    ),
    (
        "scheduler.vllm_decoder",
        f"{RUNNER}._get_slot_mappings",
        "slot_mapping[num_tokens_unpadded:num_tokens_padded].fill_(-1)",
        "gives padding no slot",
    ),
    (
        "scheduler.engine",
        "vllm.v1.executor.abstract:Executor.get_class",
        "executor_class = resolve_obj_by_qualname(distributed_executor_backend)",
        "takes an executor by name",
    ),
    (
        "scheduler.engine",
        "vllm.config:VllmConfig._get_v2_model_runner_unsupported_features",
        "'custom_class'",
        "chooses the runner that we extend",
    ),
    (
        "scheduler.engine",
        "vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        "scheduler_config.async_scheduling = False",
        "calls update_draft_token_ids after every step",
    ),
]
