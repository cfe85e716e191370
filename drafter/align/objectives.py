"""What the alignment minimises: small functions of logits and labels behind one interface, weighted per draft slot."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from drafter.align.options import Objective

_LEAST_CHANCE = 0.5  # D-PACE's alpha: what a slot is given at least, so that later ones never lose all weight
_OVERLAP_SHARE = 0.9  # DSpark's mixture of overlap and cross-entropy


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
        slot_decay: of ``falling_weights``, which all but ``EXPECTED`` weigh with.
        distillation_share: weight of the target's distribution against its most likely token, 0 to 1.
    """
    expected = objective is Objective.EXPECTED
    weights = expected_weights(slots) if expected else falling_weights(slots.labels.shape[1], slot_decay)
    hard = streak(slots) if objective is Objective.STREAK else label_cross_entropy(slots, weights)
    soft = distillation(slots, weights)
    if objective is Objective.OVERLAP:
        soft = _OVERLAP_SHARE * missing_overlap(slots, weights) + (1 - _OVERLAP_SHARE) * soft
    return (1 - distillation_share) * hard + distillation_share * soft


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
