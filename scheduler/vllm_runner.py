"""vLLM's model runner, extended to hand every target forward pass to a proposer."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from vllm import SamplingParams
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.outputs import DraftTokenIds, SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from drafter.noise import request_seed
from drafter.types import Drafts, PagedCacheSpec, RandomSampling, TargetForward
from scheduler.vllm_hidden_states import tap_hidden_states
from scheduler.vllm_platform import BaseModelRunner
from scheduler.vllm_proposer import ProposerHost
from scheduler.vllm_sampler import PositionKeyedSampler, StepKeys, use_position_keyed_sampling
from scheduler.vllm_types import DraftingSchedulerOutput, SurvivalDraftTokenIds


@dataclass(frozen=True, slots=True)
class KnownRequest:
    """What of a request stays the same in all of its steps; the fields are ``TargetForward``'s, for one request."""

    seed: int
    end_tokens: frozenset[int]
    private: bool
    sampling: RandomSampling | None

    @classmethod
    def of(cls, params: SamplingParams | None, seed: int, private: bool) -> "KnownRequest":
        """Of a request with these sampling parameters."""
        return cls(seed, end_tokens(params), private, random_sampling(params, seed))


class SlipstreamModelRunner(BaseModelRunner):
    """Runs the target, samples with position-keyed noise, and lets the proposer see every forward pass."""

    sampler: PositionKeyedSampler

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        use_position_keyed_sampling(self)
        self._host: ProposerHost | None = cast(ProposerHost | None, getattr(self, "drafter", None))
        self.use_aux_hidden_state_outputs = self._host is not None
        self._known: dict[str, KnownRequest] = {}
        self._finished: list[str] = []
        self._drafts = Drafts()
        self._group = 0

    def _get_eagle3_aux_layers_from_config(self) -> tuple[int, ...] | None:
        return self._host.proposer.hidden_state_layers if self._host else None

    def _setup_eagle3_aux_hidden_state_outputs(self) -> None:
        model = self.get_model()
        if self._host is None or supports_eagle3(model):
            super()._setup_eagle3_aux_hidden_state_outputs()
            return
        if not self.model_config.enforce_eager:
            raise ValueError(f"hidden states of {type(model).__name__} can be had without compilation only: set it off")
        tap_hidden_states(model, self._host.proposer.hidden_state_layers)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """Allocate the target's cache, then the proposer's over the same pages."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if self._host is None:
            return
        self._group = full_attention_group(kv_cache_config)
        table = self.input_batch.block_table[self._group]
        pages_per_block = kv_cache_config.kv_cache_groups[self._group].kv_cache_spec.block_size // table.block_size
        spec = PagedCacheSpec(kv_cache_config.num_blocks * pages_per_block, table.block_size, self.device)
        self._host.proposer.attach(self._host.target(), spec)
        # vLLM copies pages of every tensor in this list when it splits a shared page, ours included.
        self.kv_caches.extend(self._host.proposer.page_tensors())

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        self._finished.extend(scheduler_output.finished_req_ids)
        if scheduler_output.kv_cache_block_copies and self._host is not None:
            self._host.proposer.settle()
        drafting = isinstance(scheduler_output, DraftingSchedulerOutput)
        private = scheduler_output.private_requests if drafting else frozenset()
        for request_id in scheduler_output.finished_req_ids:
            self._known.pop(request_id, None)
        corrections = super()._update_states(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            seed = request_seed(params and params.seed, self.model_config.seed, request.req_id)
            self._known[request.req_id] = KnownRequest.of(params, seed, request.req_id in private)
            # The noise needs no generator, and vLLM's CPU backend dies rewinding one.
            self.requests[request.req_id].generator = None
        self.input_batch.generators.clear()
        return corrections

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None  # nothing to verify: a plain step
        batch = self.input_batch
        if not batch.sampling_metadata.all_greedy:
            num_reqs = batch.num_reqs
            self.sampler.keys = StepKeys(
                torch.tensor([self._known[r].seed for r in batch.req_ids[:num_reqs]], device=self.device),
                torch.from_numpy(batch.num_tokens_no_spec[:num_reqs].astype(np.int64)).to(self.device),
                list(spec_decode_metadata.num_draft_tokens) if spec_decode_metadata else [0] * num_reqs,
            )
        return super()._sample(logits, spec_decode_metadata)

    def _input_fits_in_drafter(self, common_attn_metadata: object) -> bool:
        # vLLM would skip the proposer for the whole batch when one request nears the maximum length, and with it
        # the context K/V of all others. Lengths are limited per request instead (_draft_limits).
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        sampling_metadata: object,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        *args: object,
    ) -> list[list[int]]:
        """Called by vLLM after every step, with prompts still being read among the requests."""
        assert self._host is not None and aux_hidden_states is not None
        forward = self._target_forward(scheduler_output, sampled_token_ids, aux_hidden_states)
        self._drafts = self._host.proposer.propose(forward)
        return self._drafts.token_ids

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """vLLM's draft ids, with the survival estimates beside them."""
        taken = super().take_draft_token_ids()
        if taken is None:
            return None
        survival, late_seconds = self._drafts.survival, self._drafts.late_seconds
        return SurvivalDraftTokenIds(taken.req_ids, taken.draft_token_ids, survival, late_seconds)

    def _target_forward(
        self, output: SchedulerOutput, sampled: list[list[int]], hidden_states: list[torch.Tensor]
    ) -> TargetForward:
        batch = self.input_batch
        num_reqs = batch.num_reqs
        request_ids = list(batch.req_ids[:num_reqs])
        known = [self._known[r] for r in request_ids]
        lengths = np.array([output.num_scheduled_tokens[r] for r in request_ids])
        drafted = np.array([len(output.scheduled_spec_decode_tokens.get(r, ())) for r in request_ids])
        accepted = np.array([max(len(tokens) - 1, 0) for tokens in sampled])
        rejected = np.where([bool(tokens) for tokens in sampled], drafted - accepted, 0)
        total = int(lengths.sum())
        context_lens = batch.num_computed_tokens_cpu[:num_reqs] + lengths - rejected
        table = batch.block_table[self._group]
        finished, self._finished = self._finished, []
        return TargetForward(
            request_ids=request_ids,
            row_starts=torch.from_numpy(np.concatenate([[0], lengths.cumsum()])).to(self.device),
            token_ids=self.input_ids.gpu[:total].long(),
            positions=self.positions[:total].clone(),  # the proposer may keep what the next step overwrites
            slot_mapping=table.slot_mapping.gpu[:total].clone(),
            block_table=table.get_device_tensor(num_reqs),
            hidden_states=[h[:total] for h in hidden_states],
            context_lens=torch.from_numpy(context_lens.astype(np.int64)).to(self.device),
            sampled=sampled,
            draft_limits=self._draft_limits(request_ids, context_lens, output),
            end_tokens=[each.end_tokens for each in known],
            private=[each.private for each in known],
            finished=finished,
            prompt_lens=batch.num_prompt_tokens[:num_reqs].tolist(),
            sampling=[each.sampling for each in known],
        )

    def _draft_limits(self, request_ids: list[str], context_lens: np.ndarray, output: SchedulerOutput) -> list[int]:
        """Draft tokens that are worth it and can still be emitted: a step emits one token more than it accepts."""
        planned = output.draft_lengths if isinstance(output, DraftingSchedulerOutput) else {}
        limits = []
        for request_id, context_len in zip(request_ids, context_lens.tolist(), strict=True):
            state = self.requests[request_id]
            params = state.sampling_params
            room = self.max_model_len - context_len - 2
            if params is not None:
                if params.max_tokens is not None:
                    room = min(room, params.max_tokens - len(state.output_token_ids) - 1)
                if state.output_token_ids and state.output_token_ids[-1] in self._known[request_id].end_tokens:
                    room = 0
            limits.append(max(min(room, planned.get(request_id, room)), 0))
        return limits


def random_sampling(params: SamplingParams | None, seed: int) -> RandomSampling | None:
    """How the target draws a request's tokens; ``None`` if it takes the most likely ones."""
    if params is None or params.sampling_type is SamplingType.GREEDY:
        return None
    return RandomSampling(seed, params.temperature, max(params.top_k, 0), params.top_p)


def end_tokens(params: SamplingParams | None) -> frozenset[int]:
    """Tokens behind which a request ends: its stop tokens, and the end of text unless it goes on past that."""
    if params is None:
        return frozenset()
    end_of_text = {params.eos_token_id} - {None}  # `None` where the request ignores it
    return frozenset(end_of_text).union(params.stop_token_ids or ())


def full_attention_group(kv_cache_config: KVCacheConfig) -> int:
    """Index of the KV group whose pages hold the whole context.

    Raises:
        ValueError: the target has none, so there is no block table that a drafter could share.
    """
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        if isinstance(group.kv_cache_spec, FullAttentionSpec):
            return index
    kinds = sorted({type(g.kv_cache_spec).__name__ for g in kv_cache_config.kv_cache_groups})
    raise ValueError(f"the target has no full-attention layers to share pages with: its KV groups are {kinds}")
