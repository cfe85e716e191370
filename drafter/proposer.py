"""Proposing draft tokens while serving: context K/V after every target pass, then one block for every request."""

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from drafter.checkpoint import Drafter, check_fits, load_drafter
from drafter.context import context_keeper
from drafter.denoise import BlockStarts, Denoised, denoise
from drafter.layers import BlockContext
from drafter.options import ProposalOptions
from drafter.search import make_search
from drafter.serving import ServingDrafter
from drafter.thresholds import FixedThreshold, OneShotThresholds, PassRecord
from drafter.types import Drafts, PagedCacheSpec, TargetForward, TargetModel

_MOST_UNREAD = 64  # passes


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
    right for the drafter too, provided that every target pass is taken in, whether tokens are drafted or not. See
    ``drafter.context`` for when it is written.
    """

    def __init__(self, drafter: Drafter, options: ProposalOptions, source: str):
        self._drafter, self._config, self._source = drafter, drafter.model.config, source
        self._options = options
        self._max_draft_tokens = min(options.max_draft_tokens, self._config.num_draft_tokens)
        self._calibration: OneShotThresholds | None = None
        if options.calibrated_threshold and options.max_passes > 1:
            self._calibration = OneShotThresholds(options.observe_threshold)
        self._thresholds = self._calibration or FixedThreshold(options.observe_threshold)
        self._unread: list[TargetForward] = []
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
        self._context = context_keeper(self._serving, cache)
        self._search = make_search(self._options, self._serving.head, target.shape.vocab_size)

    def page_tensors(self) -> list[torch.Tensor]:
        return self._serving.pages

    @torch.inference_mode()
    def propose(self, forward: TargetForward) -> Drafts:
        """Draft for every request that can still use a draft token."""
        started = time.perf_counter()
        rows = [r for r, tokens in enumerate(forward.sampled) if tokens and forward.draft_limits[r] > 0]
        context = self._context.take(forward, rows)
        written = time.perf_counter()
        self._calibrate(forward)
        self._read(forward, bool(rows))
        drafts = Drafts.none(len(forward.request_ids))
        if rows:
            late_seconds = (written - started) * context.late_rows / context.rows
            drafts = replace(self._draft(forward, rows, context.last_features), late_seconds=late_seconds)
        self._counters.context_tokens += context.rows
        self._counters.context_seconds += written - started
        self._counters.seconds += time.perf_counter() - written
        return drafts

    @torch.inference_mode()
    def settle(self) -> None:
        """See ``Proposer``."""
        self._counters.context_tokens += self._context.settle()

    def _read(self, forward: TargetForward, now: bool) -> None:
        """Let the path search read what a pass made final: at the latest when it is asked, and many passes in one."""
        self._unread.append(replace(forward, hidden_states=()))
        if now or len(self._unread) >= _MOST_UNREAD:
            self._search.take(*self._unread)
            self._unread.clear()

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

    def _draft(self, forward: TargetForward, rows: list[int], last_features: torch.Tensor) -> Drafts:
        """Blocks for the requests ``rows``, behind the features of their last tokens."""
        drafts = Drafts.none(len(forward.request_ids))
        wanted = min(self._max_draft_tokens, max(forward.draft_limits[r] for r in rows))
        starts = _block_starts(forward, rows, last_features)
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


def _block_starts(forward: TargetForward, rows: list[int], last_features: torch.Tensor) -> BlockStarts:
    """Where the blocks of the requests ``rows`` begin, behind what each has just emitted."""
    # Mostly it is all of them, and a slice costs nothing.
    device = forward.context_lens.device
    index = slice(None) if len(rows) == len(forward.request_ids) else torch.tensor(rows, device=device)
    return BlockStarts(
        request_ids=[forward.request_ids[r] for r in rows],
        anchors=torch.tensor([forward.sampled[r][-1] for r in rows], device=device),
        last_features=last_features,
        context=BlockContext(forward.block_table[index], forward.context_lens[index].to(torch.int32)),
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
