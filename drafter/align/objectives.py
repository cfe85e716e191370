"""What the alignment minimises: small functions of logits and labels behind one interface, weighted per draft slot."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F

_LEAST_CHANCE = 0.5  # D-PACE's alpha: what a slot is given at least, so that later ones never lose all weight
_OVERLAP_SHARE = 0.9  # DSpark's mixture of overlap and cross-entropy


class Objective(StrEnum):
    """How slots are weighed and what is asked of them.

    ``FALLING``: target's most likely token and distribution, weights falling with the slot (DFlash, arXiv 2602.06036).
    ``EXPECTED``: the same, each slot weighed by the tokens that hang on it, as the drafter stands (D-PACE).
    ``STREAK``: the expected number of tokens accepted in a row itself (SpecDiff-2, arXiv 2511.00606), beside the
    target's distribution. ``OVERLAP``: what both distributions have in common (DSpark, arXiv 2607.05147).
    """

    FALLING = "falling"
    EXPECTED = "expected"
    STREAK = "streak"
    OVERLAP = "overlap"


@dataclass(frozen=True, slots=True)
class DraftSlots:
    """What a loss is a function of.

    Attributes:
        logits, teacher_logits: ``[blocks, slots, draft_vocab]``, the drafter's and the target's.
        labels: ``[blocks, slots]`` the target's most likely tokens, as indices into the draft vocabulary; negative
            ones do not count.
        counted: ``[blocks, slots]`` bool, slots whose distribution is learnt.
    """

    logits: torch.Tensor
    teacher_logits: torch.Tensor
    labels: torch.Tensor
    counted: torch.Tensor


def loss_of(objective: Objective, slots: DraftSlots, slot_decay: float, distillation_share: float) -> torch.Tensor:
    """The loss to minimise.

    Args:
        slot_decay: of ``falling_weights``; ``EXPECTED`` and ``STREAK`` need none.
        distillation_share: weight of the target's distribution against its most likely token, 0 to 1.
    """
    falling = falling_weights(slots.labels.shape[1], slot_decay)
    losses: dict[Objective, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
        Objective.FALLING: lambda: (label_cross_entropy(slots, falling), distillation(slots, falling)),
        Objective.EXPECTED: lambda: _with(slots, expected_weights(slots)),
        Objective.STREAK: lambda: (streak(slots), distillation(slots, falling)),
        Objective.OVERLAP: lambda: (label_cross_entropy(slots, falling), _overlap(slots, falling)),
    }
    hard, soft = losses[objective]()
    return (1 - distillation_share) * hard + distillation_share * soft


def _with(slots: DraftSlots, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return label_cross_entropy(slots, weights), distillation(slots, weights)


def _overlap(slots: DraftSlots, weights: torch.Tensor) -> torch.Tensor:
    return _OVERLAP_SHARE * missing_overlap(slots, weights) + (1 - _OVERLAP_SHARE) * distillation(slots, weights)


def falling_weights(count: int, decay: float) -> torch.Tensor:
    """Slot weights ``[count]``, ``exp(-k / decay)``: an early miss makes every later slot worthless (DFlash)."""
    return torch.exp(-torch.arange(count, dtype=torch.float32) / decay)


@torch.no_grad()
def expected_weights(slots: DraftSlots) -> torch.Tensor:
    """Slot weights ``[blocks, slots]``: the tokens accepted on expectation that a slot is needed for (D-PACE).

    ``w_j = sum over m >= j of the product of q_i for i <= m``, with ``q`` the chance of each label, not below a half.
    A block's weights are scaled so that its first slot weighs 1.
    """
    chances = _LEAST_CHANCE + (1 - _LEAST_CHANCE) * _chances(slots)
    reached = (chances * (slots.labels >= 0)).cumprod(dim=1)
    weights = reached.flip(1).cumsum(dim=1).flip(1)
    return weights / weights[:, :1].clamp(min=1e-6)


def label_cross_entropy(slots: DraftSlots, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy with the labels; ``weights`` ``[slots]`` or ``[blocks, slots]``."""
    losses = F.cross_entropy(slots.logits.flatten(0, 1), slots.labels.flatten(), ignore_index=-1, reduction="none")
    return _mean(losses.view(slots.labels.shape), (slots.labels >= 0) * weights)


def distillation(slots: DraftSlots, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy with the target's own distribution over the draft vocabulary; weights as above."""
    teacher = slots.teacher_logits.softmax(dim=-1)
    losses = -(teacher * slots.logits.log_softmax(dim=-1)).sum(dim=-1)
    return _mean(losses, slots.counted * weights)


def missing_overlap(slots: DraftSlots, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of half the L1 distance of both distributions: the chance that a sampled draft is rejected."""
    distance = (slots.logits.softmax(dim=-1) - slots.teacher_logits.softmax(dim=-1)).abs().sum(dim=-1) / 2
    return _mean(distance, slots.counted * weights)


def streak(slots: DraftSlots) -> torch.Tensor:
    """Share of the block that is not accepted on expectation: 1 less the mean of the products of label chances."""
    reached = (_chances(slots) * (slots.labels >= 0)).cumprod(dim=1)
    possible = (slots.labels >= 0).to(reached.dtype).cumprod(dim=1)
    return 1 - reached.sum() / possible.sum().clamp(min=1e-6)


def _chances(slots: DraftSlots) -> torch.Tensor:
    """``[blocks, slots]`` probability of each label; of those that do not count, of some token."""
    log_chances = slots.logits.log_softmax(dim=-1).gather(2, slots.labels.clamp(min=0)[..., None])[..., 0]
    return log_chances.exp()


def _mean(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)
