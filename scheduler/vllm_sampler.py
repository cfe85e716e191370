"""One sampler for plain and drafted decoding, in the place of vLLM's two.

vLLM draws different random numbers with and without drafts and keeps a generator per seeded request, whose state
its CPU backend cannot rewind. Here every row is sampled with noise keyed by (seed, position, token id), and a
draft token is accepted while it equals the row's own sample. With one-hot drafts that is exactly the target's
distribution, and the same text as decoding without drafts.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from drafter.noise import sample_rows

if TYPE_CHECKING:
    from scheduler.vllm_runner import SlipstreamModelRunner


@dataclass(frozen=True, slots=True)
class StepKeys:
    """What keys the noise of one step.

    Attributes:
        seeds: ``[requests]`` int64.
        positions: ``[requests]`` int64, position of the first token that the step samples for each request.
        drafts: draft tokens verified per request.
    """

    seeds: torch.Tensor
    positions: torch.Tensor
    drafts: list[int]

    def last_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Seeds and positions of the rows behind all drafts: the only rows of a plain step."""
        return self.seeds, self.positions + torch.tensor(self.drafts, device=self.seeds.device)

    def draft_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Seeds and positions of the rows that check the drafts, request by request."""
        counts = torch.tensor(self.drafts, device=self.seeds.device)
        offsets = torch.cat([torch.arange(n, device=self.seeds.device) for n in self.drafts])
        return self.seeds.repeat_interleave(counts), self.positions.repeat_interleave(counts) + offsets


class PositionKeyedSampler(Sampler):
    """vLLM's sampler with position-keyed noise; ``keys`` is set before every step that samples randomly."""

    keys: StepKeys | None = None

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Like vLLM's ``Sampler.sample``; greedy steps are left to it."""
        if sampling_metadata.all_greedy:
            return super().sample(logits, sampling_metadata, logprobs_mode_override)
        assert self.keys is not None and sampling_metadata.temperature is not None
        greedy = None if sampling_metadata.all_random else self.greedy_sample(logits)
        logits = self.apply_temperature(logits, sampling_metadata.temperature, sampling_metadata.all_random)
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            logits = processor.apply(logits)
        logits = apply_top_k_top_p(logits, sampling_metadata.top_k, sampling_metadata.top_p)
        drawn = _draw(logits, greedy, sampling_metadata.temperature != 0, self.keys.last_rows())
        mode = logprobs_mode_override or self.logprobs_mode
        if mode == "processed_logits":
            return drawn, logits
        return drawn, self.compute_logprobs(logits) if mode == "processed_logprobs" else None


class PositionKeyedRejectionSampler(RejectionSampler):
    """Accepts a draft token while the row's own sample equals it.

    Penalties, bad words and log-probabilities are vLLM's; temperature, top-k and top-p are expanded to the draft
    rows here, because vLLM's kernel for that needs Triton and leaves garbage where there is none.
    """

    sampler: PositionKeyedSampler

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Verify one step's drafts.

        Args:
            metadata: which rows of ``logits`` check drafts and which lie behind all drafts of a request.
            draft_probs: ignored, drafts are one-hot.
            logits: ``[draft tokens + requests, vocab]``.
            sampling_metadata: per request.

        Returns:
            Emitted tokens ``[requests, max drafts + 1]``, padded with vLLM's placeholder, and log-probabilities.
        """
        wants_logprobs = sampling_metadata.max_num_logprobs is not None
        processed = self.is_processed_logprobs_mode
        bonus = self.sampler(
            logits[metadata.bonus_logits_indices],
            replace(sampling_metadata, max_num_logprobs=-1 if wants_logprobs else None),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if processed else "raw_logits",
        )
        raw = logits[metadata.target_logits_indices].to(torch.float32)
        constrained = self.apply_logits_processors(raw.clone(), sampling_metadata, metadata)
        tokens, constrained = self._sample_draft_rows(constrained, metadata.num_draft_tokens, sampling_metadata)
        emitted = accept_equal(
            metadata.draft_token_ids,
            tokens,
            metadata.num_draft_tokens,
            bonus.sampled_token_ids,
            metadata.max_spec_len,
        )
        logprobs = None
        if wants_logprobs:
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                constrained if processed else raw,
                bonus.logprobs_tensors.logprobs,
                emitted,
            )
        return SamplerOutput(sampled_token_ids=emitted, logprobs_tensors=logprobs)

    def _sample_draft_rows(
        self, logits: torch.Tensor, num_draft_tokens: list[int], sampling_metadata: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the target says on the rows that check drafts, and the logits it was drawn from."""
        greedy = self.sampler.greedy_sample(logits)
        if sampling_metadata.all_greedy:
            return greedy, logits
        assert self.sampler.keys is not None and sampling_metadata.temperature is not None
        counts = torch.tensor(num_draft_tokens, device=logits.device)

        def by_row(per_request: torch.Tensor | None) -> torch.Tensor | None:
            return None if per_request is None else per_request.repeat_interleave(counts)

        temperature = sampling_metadata.temperature.repeat_interleave(counts)
        is_random = temperature != 0
        logits = logits / torch.where(is_random, temperature, 1.0)[:, None]
        logits = apply_top_k_top_p(logits, by_row(sampling_metadata.top_k), by_row(sampling_metadata.top_p))
        return _draw(logits, greedy, is_random, self.sampler.keys.draft_rows()), logits


def _draw(
    logits: torch.Tensor,
    greedy: torch.Tensor | None,
    is_random: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Samples of the random rows beside the ``greedy`` ones, which may be absent when there are none."""
    seeds, positions = keys
    if greedy is None:
        return sample_rows(logits, seeds, positions)
    tokens = greedy.long()
    tokens[is_random] = sample_rows(logits[is_random], seeds[is_random], positions[is_random])
    return tokens


def accept_equal(
    draft_token_ids: torch.Tensor,
    sampled: torch.Tensor,
    num_draft_tokens: list[int],
    bonus_token_ids: torch.Tensor,
    max_draft_tokens: int,
) -> torch.Tensor:
    """Emit, per request, its samples up to the first that differs from the draft, and the bonus if none does.

    Args:
        draft_token_ids, sampled: ``[sum(num_draft_tokens)]`` draft tokens and what the target says there.
        bonus_token_ids: ``[requests, 1]``, the sample behind the last draft.

    Returns:
        ``[requests, max_draft_tokens + 1]`` int32, padded with vLLM's placeholder.
    """
    output = torch.full((len(num_draft_tokens), max_draft_tokens + 1), PLACEHOLDER_TOKEN_ID, dtype=torch.int32)
    drafts, tokens, bonus = draft_token_ids.tolist(), sampled.tolist(), bonus_token_ids.flatten().tolist()
    start = 0
    for r, count in enumerate(num_draft_tokens):
        pairs = zip(drafts[start : start + count], tokens[start : start + count], strict=True)
        accepted = next((k for k, (draft, token) in enumerate(pairs) if draft != token), count)
        emitted = (
            tokens[start : start + accepted + 1] if accepted < count else [*tokens[start : start + count], bonus[r]]
        )
        output[r, : len(emitted)] = torch.tensor(emitted, dtype=torch.int32)
        start += count
    return output.to(draft_token_ids.device)


def use_position_keyed_sampling(runner: "SlipstreamModelRunner") -> None:
    """Put our samplers in the place of the ones that vLLM's runner built."""
    sampler = PositionKeyedSampler(runner.sampler.logprobs_mode, runner.sampler.use_fp64_gumbel)
    runner.sampler = sampler
    if hasattr(runner, "rejection_sampler"):
        runner.rejection_sampler = PositionKeyedRejectionSampler(sampler, runner.speculative_config, runner.device)
