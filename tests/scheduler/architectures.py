"""Tiny random targets of every architecture whose layers are fused, through a real engine; run as a process.

Each is served once with its layers on our kernel and once as vLLM computes it. One JSON line is printed: by
architecture and by how the weights are held, what the layers' ``forward`` is and what was answered.

Usage: ``python -m tests.scheduler.architectures FOLDER``
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # of what vLLM compiles for itself; it takes longer than all else here

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from scheduler.engine import EngineShape, engine_arguments
from scheduler.options import EngineOptions, TargetWeights

_VOCAB = 512
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}
# Llama with an output head that is its embedding, Qwen2 with biases, Qwen3 with norms of heads; groups of 3, 1 and 8.
_ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        num_attention_heads=6, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, rms_norm_eps=1e-5, **_SIZES
    ),
    "qwen2": Qwen2Config(num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=False, **_SIZES),
    "qwen3": Qwen3Config(
        num_attention_heads=8, num_key_value_heads=1, head_dim=32, tie_word_embeddings=False, **_SIZES
    ),
}
# Longer than a step's tokens, so that prompts are read in parts and beside tokens of others.
_PROMPTS = {"short": 5, "long": 170, "longest": 300}
_NEW_TOKENS = 12


def write_model(config: PretrainedConfig, folder: Path) -> None:
    """Save a model with random numbers in every parameter, biases and norms included."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))
    model.save_pretrained(folder)


def answers(engine: LLMEngine, names: list[str], **options: Any) -> dict[str, Any]:
    """Run prompts together to their end: tokens, log-probabilities of answer and prompt, and the closest call."""
    for name in names:
        generator = torch.Generator().manual_seed(_PROMPTS[name])
        prompt = torch.randint(0, _VOCAB, (_PROMPTS[name],), generator=generator).tolist()
        params = SamplingParams(
            temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=2, **options
        )
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    finished = {}
    while engine.has_unfinished_requests():
        for request in engine.step():
            if not request.finished:
                continue
            tokens = list(request.outputs[0].token_ids)
            choices = [sorted((c.logprob for c in step.values()), reverse=True) for step in request.outputs[0].logprobs]
            prompt_steps = zip(request.prompt_token_ids[1:], (request.prompt_logprobs or [])[1:], strict=False)
            finished[request.request_id] = {
                "tokens": tokens,
                "logprobs": [step[t].logprob for t, step in zip(tokens, request.outputs[0].logprobs, strict=True)],
                "prompt_logprobs": [step[token].logprob for token, step in prompt_steps],
                "closest": min(best - second for best, second in choices),
            }
    return finished


def serve(folder: Path, weights: TargetWeights) -> dict[str, Any]:
    """Start an engine, ask it, end it."""
    shape = EngineShape(
        str(folder), max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64, kv_cache_bytes=16 << 20
    )
    arguments = engine_arguments(shape, EngineOptions(weights=weights))
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments, skip_tokenizer_init=True))
    core: Any = engine.engine_core.engine_core
    layers = core.model_executor.driver_worker.worker.model_runner.model.model.layers
    report = {
        "forwards": [type(layer.forward).__name__ for layer in layers],
        "together": answers(engine, list(_PROMPTS), prompt_logprobs=0),
        "again": answers(engine, list(reversed(_PROMPTS))),
        "alone": {name: answers(engine, [name])[name] for name in _PROMPTS},
    }
    del engine, core, layers
    cleanup_dist_env_and_memory()
    gc.collect()
    return report


def main(folder: str) -> None:
    """Serve every architecture both ways and print what came of it."""
    reports: dict[str, Any] = {}
    for name, config in _ARCHITECTURES.items():
        model = Path(folder) / name
        write_model(config, model)
        ways = (TargetWeights.EXACT, TargetWeights.VLLM)
        reports[name] = {weights.value: serve(model, weights) for weights in ways}
    print(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1])
