"""What a refinement pass computes, and when there is none: planning only, no network and no cache.

After a pass over a block, draft tokens that are probable enough become *observed*: the slot that holds such a token
as its input moves to the physical front, and the next pass predicts the others again given it (WeDLM's topological
reordering, arXiv 2512.22737). Slot 0 holds the anchor; slot ``i + 1`` holds draft token ``i``. In the shift scheme
slot ``i`` predicts draft token ``i``, so that no slot holds the last one; in DFlash's scheme slot ``i + 1`` does.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from cuda_ext import ops
from drafter.config import DrafterConfig

MASKED = 2**30
"""``observed_at`` of a slot that is not observed."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Which slots of a block predict and hold which draft tokens.

    Attributes:
        slots: slots that are computed.
        drafts: draft tokens that are wanted.
        first: slot that predicts draft token 0; those behind it predict the following ones.
        causal: attention in the block is causal in physical order.
    """

    slots: int
    drafts: int
    first: int
    causal: bool

    @classmethod
    def of(cls, config: DrafterConfig, drafts: int) -> "BlockShape":
        """The block for ``drafts`` draft tokens: a causal one needs no more slots than those that predict them."""
        first = config.block_size - config.num_draft_tokens
        return cls(first + drafts if config.causal else config.block_size, drafts, first, config.causal)

    @property
    def held(self) -> int:
        """How many draft tokens, the first ones, have a slot that holds them."""
        return min(self.drafts, self.slots - 1)

    def unobserved(self, requests: int, device: torch.device) -> torch.Tensor:
        """``observed_at`` ``[requests, slots]`` int32 of blocks of which only the anchor is known."""
        observed_at = torch.full((requests, self.slots), MASKED, dtype=torch.int32, device=device)
        observed_at[:, 0] = 0
        return observed_at

    def open_drafts(self, observed_at: torch.Tensor) -> torch.Tensor:
        """``[requests, drafts]`` bool, the draft tokens that are not observed."""
        still_open = torch.ones(len(observed_at), self.drafts, dtype=torch.bool, device=observed_at.device)
        still_open[:, : self.held] = observed_at[:, 1 : 1 + self.held] == MASKED
        return still_open


@dataclass(frozen=True, slots=True)
class PassPlan:
    """The rows of one pass, ``[requests, rows]``; requests with fewer rows are padded at the end.

    Attributes:
        slots: int64 logical slots; anything for padding.
        positions: int64 logical positions.
        places: int64 physical places, -1 for padding.
        visible: int32 physical slots that each row sees, 1 for padding.
        predicting: bool, the rows whose logits are worth computing: those of draft tokens not yet observed.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    visible: torch.Tensor
    predicting: torch.Tensor


def plan_first_pass(shape: BlockShape, first_positions: torch.Tensor) -> PassPlan:
    """``plan_pass`` of blocks of which only the anchor is known: all slots in order, laid out once for all time.

    Args:
        first_positions: ``[requests]`` int32 or int64 position of the anchor.
    """
    plan = _first_pass(shape, len(first_positions), first_positions.device)
    return replace(plan, positions=first_positions[:, None] + plan.positions)


@lru_cache(maxsize=256)
def _first_pass(shape: BlockShape, requests: int, device: torch.device) -> PassPlan:
    """The first pass over blocks at position 0; nobody may change its tensors."""
    slots = torch.arange(shape.slots, device=device)
    visible = slots + 1 if shape.causal else torch.full_like(slots, shape.slots)
    predicting = (slots >= shape.first) & (slots < shape.first + shape.drafts)
    rows = (slots, slots, slots, visible.to(torch.int32), predicting)
    return PassPlan(*(row.repeat(requests, 1) for row in rows))


def plan_pass(
    shape: BlockShape, observed_at: torch.Tensor, first_positions: torch.Tensor, pass_number: int
) -> PassPlan:
    """Lay out pass ``pass_number``, counted from 1.

    In a causal block the keys and values of a slot are final once a pass has computed it as observed: only slots
    observed after the pass before and masked ones have rows. In a bidirectional block all have.

    Args:
        observed_at: ``[requests, slots]`` int32: 0 for the anchor, ``p`` for slots observed after pass ``p``,
            ``MASKED`` for the others.
        first_positions: ``[requests]`` int64 position of the anchor.
    """
    order, _, positions, visible = ops.partition_block(observed_at, first_positions)
    slots = shape.slots
    if not shape.causal:
        visible = torch.full_like(visible, slots)
    final = (observed_at < pass_number - 1).sum(dim=1) if shape.causal else torch.zeros_like(first_positions)
    rows = slots - int(final.min())
    places = final[:, None] + torch.arange(rows, device=order.device)
    padding = places >= slots
    at = places.clamp(max=slots - 1)
    row_slots = order.gather(1, at)
    drafts = row_slots - shape.first
    still_open = shape.open_drafts(observed_at).gather(1, drafts.clamp(0, shape.drafts - 1))
    return PassPlan(
        slots=row_slots,
        positions=positions.gather(1, at),
        places=places.masked_fill(padding, -1),
        visible=visible.gather(1, at).masked_fill(padding, 1),
        predicting=still_open & (drafts >= 0) & (drafts < shape.drafts) & ~padding,
    )


def observe(
    shape: BlockShape, observed_at: torch.Tensor, confident: torch.Tensor, pass_number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the confident draft tokens of a pass as observed.

    Args:
        observed_at: ``[requests, slots]`` int32 before the pass.
        confident: ``[requests, drafts]`` bool.
        pass_number: the pass that predicted them, counted from 1.

    Returns:
        ``observed_at`` after the pass, and ``[requests]`` bool: whether another pass can gain anything, which takes
        a newly observed token and one that is still open.
    """
    newly = torch.zeros_like(observed_at, dtype=torch.bool)
    newly[:, 1 : 1 + shape.held] = (confident & shape.open_drafts(observed_at))[:, : shape.held]
    after = observed_at.masked_fill(newly, pass_number)
    return after, newly.any(dim=1) & shape.open_drafts(after).any(dim=1)
