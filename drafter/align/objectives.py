"""Losses of the alignment; each is a small function of logits and labels, weighted per draft slot."""

import torch
import torch.nn.functional as F


def falling_weights(count: int, decay: float) -> torch.Tensor:
    """Slot weights ``exp(-k / decay)``: an early miss makes every later slot worthless (DFlash, arXiv 2602.06036)."""
    return torch.exp(-torch.arange(count, dtype=torch.float32) / decay)


def label_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy.

    Args:
        logits: ``[blocks, slots, draft_vocab]``.
        labels: ``[blocks, slots]`` indices into the draft vocabulary; negative ones do not count.
        weights: ``[slots]``.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none")
    counted = (labels >= 0) * weights
    return (losses.view(labels.shape) * counted).sum() / counted.sum().clamp(min=1e-6)


def distillation(
    logits: torch.Tensor, teacher_logits: torch.Tensor, counted: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted mean cross-entropy against the target's own distribution over the draft vocabulary.

    Args:
        logits, teacher_logits: ``[blocks, slots, draft_vocab]``.
        counted: ``[blocks, slots]`` bool.
        weights: ``[slots]``.
    """
    teacher = teacher_logits.softmax(dim=-1)
    losses = -(teacher * logits.log_softmax(dim=-1)).sum(dim=-1)
    scale = counted * weights
    return (losses * scale).sum() / scale.sum().clamp(min=1e-6)
