"""Filling the blocks of several requests: one pass of the network, and refinement passes as far as they gain."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from drafter.layers import BlockContext, BlockRows
from drafter.refine import BlockShape, PassPlan, observe, plan_first_pass, plan_pass
from drafter.serving import BlockCache, ServingDrafter
from drafter.thresholds import Thresholds
from drafter.types import DraftPath, PathSearcher


@dataclass(frozen=True, slots=True)
class BlockStarts:
    """Where the blocks begin.

    Attributes:
        request_ids: ``R`` ids.
        anchors: ``[R]`` int64, the last emitted tokens, which the target has not run yet.
        last_features: ``[R, hidden]`` context features of the tokens before the anchors.
        context: the pages before each block.
    """

    request_ids: Sequence[str]
    anchors: torch.Tensor
    last_features: torch.Tensor
    context: BlockContext

    def select(self, rows: torch.Tensor) -> "BlockStarts":
        """The blocks of some requests, ``rows`` ``[r]`` int64."""
        return BlockStarts(
            [self.request_ids[row] for row in rows.tolist()],
            self.anchors[rows],
            self.last_features[rows],
            BlockContext(self.context.block_tables[rows], self.context.lengths[rows]),
        )


@dataclass(slots=True)
class Denoised:
    """Drafts and how they came about.

    Attributes:
        path: the drafts.
        passes: ``[R]`` int64 passes over each block.
        trace: per pass, the path after it and ``[R, drafts]`` bool, the draft tokens that it could change: those not
            observed, of requests that took part.
    """

    path: DraftPath
    passes: torch.Tensor
    trace: list[tuple[DraftPath, torch.Tensor]] = field(default_factory=list)


def denoise(
    serving: ServingDrafter,
    starts: BlockStarts,
    drafts: int,
    search: PathSearcher,
    thresholds: Thresholds,
    max_passes: int,
) -> Denoised:
    """Draft ``drafts`` tokens behind every anchor.

    Args:
        search: picks the path after every pass, always for all ``R`` requests.
        thresholds: probabilities from which draft tokens are observed.
        max_passes: at most that many passes over a block, from 1.
    """
    shape = BlockShape.of(serving.config, drafts)
    cache = serving.block_cache(len(starts.anchors), shape.slots)
    logits = _first_pass(serving, starts, shape, cache)
    path = search(logits, starts.anchors, None)
    passes = torch.ones_like(starts.anchors)
    result = Denoised(path, passes, [(path, torch.ones_like(path.tokens, dtype=torch.bool))])
    if max_passes == 1:
        return result
    blocks = _Blocks(serving, starts, shape, cache, logits)
    for number in range(2, max_passes + 1):
        enough = thresholds.at(number - 1, starts.request_ids, drafts).to(path.probabilities.device)
        if not blocks.observe(path, path.probabilities >= enough, number - 1):
            break
        path = search(blocks.predict(number), starts.anchors, blocks.fixed)
        result.path = path
        passes[blocks.refined] += 1
        result.trace.append((path, blocks.open_drafts()))
    return result


def _first_pass(serving: ServingDrafter, starts: BlockStarts, shape: BlockShape, cache: BlockCache) -> torch.Tensor:
    """Run blocks of which only the anchors are known; returns the logits ``[R, drafts, draft_vocab]``."""
    plan = plan_first_pass(shape, starts.context.lengths)
    tokens = torch.full(plan.slots.shape, serving.config.mask_token_id, device=starts.anchors.device)
    tokens[:, 0] = starts.anchors
    inputs = serving.block_inputs(tokens, plan.slots, starts.last_features)
    rows = BlockRows(plan.positions, plan.places, plan.visible)
    hidden = serving.run(inputs, rows, starts.context, cache)
    return serving.head.logits(hidden[:, shape.first : shape.first + shape.drafts])


class _Blocks:
    """The blocks of all requests between passes; those with nothing left to gain drop out for good.

    Attributes:
        fixed: ``[R, drafts]`` int64 observed draft tokens, -1 for the others.
        refined: ``[r]`` int64 rows of the requests that still take part.

    Args:
        cache: what the first pass left there.
        logits: ``[R, drafts, draft_vocab]`` of the first pass; later passes change them.
    """

    def __init__(
        self, serving: ServingDrafter, starts: BlockStarts, shape: BlockShape, cache: BlockCache, logits: torch.Tensor
    ):
        self._serving, self._starts, self._shape, self._cache, self._logits = serving, starts, shape, cache, logits
        requests, device = len(starts.anchors), starts.anchors.device
        self.fixed = torch.full((requests, shape.drafts), -1, device=device)
        self.refined = torch.arange(requests, device=device)
        self._observed_at = shape.unobserved(requests, device)

    def predict(self, pass_number: int) -> torch.Tensor:
        """Run a later pass; returns the logits ``[R, drafts, draft_vocab]`` of all draft tokens, old and new."""
        starts = self._starts
        plan = plan_pass(self._shape, self._observed_at, starts.context.lengths.long(), pass_number)
        rows = BlockRows(plan.positions, plan.places, plan.visible)
        inputs = self._serving.block_inputs(self._inputs(plan), plan.slots, starts.last_features)
        hidden = self._serving.run(inputs, rows, starts.context, self._cache)
        row, column = plan.predicting.nonzero(as_tuple=True)
        logits = self._serving.head.logits(hidden[row, column])
        self._logits[self.refined[row], plan.slots[row, column] - self._shape.first] = logits
        return self._logits

    def open_drafts(self) -> torch.Tensor:
        """``[R, drafts]`` bool, the draft tokens not observed before the last pass, of requests that it ran."""
        result = torch.zeros_like(self.fixed, dtype=torch.bool)
        result[self.refined] = self._shape.open_drafts(self._observed_at)
        return result

    def observe(self, path: DraftPath, confident: torch.Tensor, pass_number: int) -> bool:
        """Observe the confident draft tokens; returns whether any block can still gain by another pass."""
        after, gaining = observe(self._shape, self._observed_at, confident[self.refined], pass_number)
        if not bool(gaining.any()):
            return False
        if not bool(gaining.all()):
            self._keep(gaining.nonzero()[:, 0])
            after = after[gaining]
        self._observed_at = after
        observed = ~self._shape.open_drafts(after)
        self.fixed[self.refined] = path.tokens[self.refined].where(observed, -1)
        return True

    def _keep(self, rows: torch.Tensor) -> None:
        self.refined, self._starts = self.refined[rows], self._starts.select(rows)
        cache: BlockCache = self._serving.block_cache(len(rows), self._shape.slots)
        for layer in range(self._serving.config.num_layers):
            for kept, old in zip(cache.layer(layer), self._cache.layer(layer), strict=True):
                kept.copy_(old[rows])
        self._cache = cache

    def _inputs(self, plan: PassPlan) -> torch.Tensor:
        """``[r, rows]`` int64 input tokens: the anchor, observed draft tokens, masks."""
        tokens = torch.full(self._observed_at.shape, self._serving.config.mask_token_id, device=self.fixed.device)
        held = self.fixed[self.refined][:, : self._shape.held]
        tokens[:, 1 : 1 + self._shape.held] = held.where(held >= 0, self._serving.config.mask_token_id)
        tokens[:, 0] = self._starts.anchors
        return tokens.gather(1, plan.slots)
