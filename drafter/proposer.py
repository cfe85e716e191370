"""Proposing draft tokens while serving: context K/V after every target pass, then one block for every request."""

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from drafter.checkpoint import Drafter, check_fits, load_drafter
from drafter.denoise import BlockStarts, Denoised, denoise
from drafter.layers import BlockContext
from drafter.options import ProposalOptions
from drafter.pending import PendingForwards, context_of
from drafter.search import make_search
from drafter.serving import ServingDrafter
from drafter.thresholds import FixedThreshold, OneShotThresholds, PassRecord
from drafter.types import Drafts, PagedCacheSpec, TargetForward, TargetModel


@dataclass(slots=True)
class DrafterCounters:
    """What the drafter did since start; all grow only.

    Attributes:
        context_tokens: tokens whose context keys and values were written.
        blocks: blocks drafted.
        passes: passes over them; a block that was refined once counts two.
        draft_tokens: tokens proposed.
        context_seconds: time of writing the context.
        seconds: time of drafting, without that.
    """

    context_tokens: int = 0
    blocks: int = 0
    passes: int = 0
    draft_tokens: int = 0
    context_seconds: float = 0.0
    seconds: float = 0.0


class BlockDiffusionProposer:
    """Implements ``drafter.types.Proposer`` with a ``BlockDrafter``.

    The paged cache holds the drafter's own keys and values for every token of context. It is indexed by the
    target's block table and slot mapping, so prefix-cache hits, preemption and chunked prefill of the target are
    right for the drafter too, provided that every target pass is written, whether tokens are drafted or not. It can be
    written later, as only drafts read it.
    """

    def __init__(self, drafter: Drafter, options: ProposalOptions, source: str):
        self._drafter, self._config, self._source = drafter, drafter.model.config, source
        self._options = options
        self._max_draft_tokens = min(options.max_draft_tokens, self._config.num_draft_tokens)
        self._calibration: OneShotThresholds | None = None
        if options.calibrated_threshold and options.max_passes > 1:
            self._calibration = OneShotThresholds(options.observe_threshold)
        self._thresholds = self._calibration or FixedThreshold(options.observe_threshold)
        self._pending = PendingForwards()
        self._counters = DrafterCounters()

    @classmethod
    def from_checkpoint(cls, folder: Path, options: ProposalOptions) -> "BlockDiffusionProposer":
        """Load a checkpoint folder; raises ``DrafterCheckpointError`` when that is not possible."""
        return cls(load_drafter(folder), options, str(folder))

    @property
    def hidden_state_layers(self) -> tuple[int, ...]:
        return self._config.hidden_state_layers

    @property
    def max_draft_tokens(self) -> int:
        return self._max_draft_tokens

    def cache_bytes_per_token(self) -> int:
        return self._config.cache_bytes_per_token

    def attach(self, target: TargetModel, cache: PagedCacheSpec) -> None:
        """Check that the drafter fits, share the target's embedding and head, allocate the pages."""
        check_fits(self._drafter.model.config, target.shape, self._source)
        self._serving = ServingDrafter(self._drafter, target, cache)
        self._search = make_search(self._options, self._serving.head, target.shape.vocab_size)

    def page_tensors(self) -> list[torch.Tensor]:
        return self._serving.pages

    @torch.inference_mode()
    def propose(self, forward: TargetForward) -> Drafts:
        """Draft for every request that can still use a draft token.

        The context K/V of a pass are written when something is drafted behind it, or several passes later.
        """
        started = time.perf_counter()
        if not self._pending.accepts(forward):
            self.settle()
        self._pending.add(forward)
        rows = [r for r, tokens in enumerate(forward.sampled) if tokens and forward.draft_limits[r] > 0]
        features = self.settle() if rows or self._pending.is_full else None
        written = time.perf_counter()
        self._calibrate(forward)
        drafts = Drafts.none(len(forward.request_ids)) if features is None else self._draft(forward, features, rows)
        self._counters.context_seconds += written - started
        self._counters.seconds += time.perf_counter() - written
        return drafts

    def settle(self) -> torch.Tensor | None:
        """Write the context K/V of the passes that wait; the context features ``[T, hidden]`` of the last of them."""
        forwards = self._pending.take()
        if not forwards:
            return None
        hidden_states, positions, slot_mapping = context_of(forwards)
        features = self._serving.context_features(hidden_states)
        self._serving.write_context(features, positions, slot_mapping)
        self._search.take(*forwards)
        self._counters.context_tokens += len(features)
        return features[-len(forwards[-1].positions) :]

    def command(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """``counters`` answers with ``DrafterCounters``."""
        if name == "counters":
            return asdict(self._counters)
        raise ValueError(f"unknown command {name!r}: the drafter knows 'counters'")

    def _calibrate(self, forward: TargetForward) -> None:
        """Tell what was emitted and who is done to what calibrates thresholds."""
        if self._calibration is not None:
            for request_id, sampled in zip(forward.request_ids, forward.sampled, strict=True):
                self._calibration.emitted(request_id, sampled)
            self._calibration.finished(forward.finished)

    def _draft(self, forward: TargetForward, features: torch.Tensor, rows: list[int]) -> Drafts:
        """Blocks for the requests ``rows``, from the context ``features`` of the pass."""
        drafts = Drafts.none(len(forward.request_ids))
        if not rows:
            return drafts
        wanted = min(self._max_draft_tokens, max(forward.draft_limits[r] for r in rows))
        starts = _block_starts(forward, features, rows)
        search = self._search.behind(forward, rows)
        result = denoise(self._serving, starts, wanted, search, self._thresholds, self._options.max_passes)
        path = result.path
        for r, tokens, survival in zip(rows, path.tokens.tolist(), path.survival.tolist(), strict=True):
            limit = min(wanted, forward.draft_limits[r])
            if self._options.stop_at_end:
                limit = min(limit, up_to_end(tokens, forward.end_tokens[r]))
            drafts.token_ids[r], drafts.survival[r] = tokens[:limit], survival[:limit]
        if self._calibration is not None and any(map(self._calibration.wants, starts.request_ids)):
            _note(self._calibration, starts.request_ids, result)
        self._counters.blocks += len(rows)
        self._counters.passes += int(result.passes.sum())
        self._counters.draft_tokens += sum(map(len, drafts.token_ids))
        return drafts


def up_to_end(tokens: Sequence[int], ends: Set[int]) -> int:
    """How many of a draft's tokens can still be emitted: none behind the first of ``ends``.

    If that one is accepted the answer is over, and if it is rejected so is all that follows it.
    """
    return next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))


def _block_starts(forward: TargetForward, features: torch.Tensor, rows: list[int]) -> BlockStarts:
    """Where the blocks of the requests ``rows`` begin, behind what each has just emitted."""
    # Mostly it is all of them, and a slice costs nothing.
    index = slice(None) if len(rows) == len(forward.request_ids) else torch.tensor(rows, device=features.device)
    lengths = forward.context_lens[index]
    first_rows = forward.row_starts[:-1][index]
    last_rows = first_rows + lengths - 1 - forward.positions[first_rows]
    return BlockStarts(
        request_ids=[forward.request_ids[r] for r in rows],
        anchors=torch.tensor([forward.sampled[r][-1] for r in rows], device=features.device),
        last_features=features[last_rows],
        context=BlockContext(forward.block_table[index], lengths.to(torch.int32)),
    )


def _note(calibration: OneShotThresholds, request_ids: Sequence[str], result: Denoised) -> None:
    """Hand the drafts of requests that can calibrate thresholds to ``calibration``."""
    passes = [
        (path.tokens.tolist(), path.probabilities.tolist(), predicted.tolist()) for path, predicted in result.trace
    ]
    for r, request_id in enumerate(request_ids):
        if calibration.wants(request_id):
            records = [PassRecord(tokens[r], chances[r], predicted[r]) for tokens, chances, predicted in passes]
            calibration.proposed(request_id, records)
