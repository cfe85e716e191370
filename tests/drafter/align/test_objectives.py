import math

import pytest
import torch

from drafter.align.objectives import distillation, falling_weights, label_cross_entropy

LOGITS = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
TEACHER = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([[0, 4, -1], [2, -1, -1]])
WEIGHTS = torch.tensor([1.0, 0.5, 0.25])


def log_probability(logits: torch.Tensor, index: int) -> float:
    return float(logits[index]) - math.log(sum(math.exp(float(value)) for value in logits))


def test_weights_fall_exponentially() -> None:
    assert falling_weights(3, 2.0).tolist() == pytest.approx([1.0, math.exp(-0.5), math.exp(-1.0)])
    assert falling_weights(3, math.inf).tolist() == [1.0, 1.0, 1.0]


def test_cross_entropy_is_the_weighted_mean_over_labels() -> None:
    total, weight = 0.0, 0.0
    for block in range(2):
        for slot in range(3):
            label = int(LABELS[block, slot])
            if label >= 0:
                total -= float(WEIGHTS[slot]) * log_probability(LOGITS[block, slot], label)
                weight += float(WEIGHTS[slot])
    assert float(label_cross_entropy(LOGITS, LABELS, WEIGHTS)) == pytest.approx(total / weight, rel=1e-5)


def test_distillation_is_the_weighted_mean_cross_entropy_with_the_teacher() -> None:
    counted = LABELS >= 0
    total, weight = 0.0, 0.0
    for block in range(2):
        for slot in range(3):
            if counted[block, slot]:
                for token in range(5):
                    share = math.exp(log_probability(TEACHER[block, slot], token))
                    total -= float(WEIGHTS[slot]) * share * log_probability(LOGITS[block, slot], token)
                weight += float(WEIGHTS[slot])
    assert float(distillation(LOGITS, TEACHER, counted, WEIGHTS)) == pytest.approx(total / weight, rel=1e-5)


def test_distillation_is_least_where_the_teacher_is() -> None:
    logits, counted = TEACHER.clone().requires_grad_(), torch.ones(2, 3, dtype=torch.bool)
    distillation(logits, TEACHER, counted, WEIGHTS).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


def test_slots_that_do_not_count_have_no_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = label_cross_entropy(logits, LABELS, WEIGHTS) + distillation(logits, TEACHER, LABELS >= 0, WEIGHTS)
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().amax(-1) > 0, LABELS >= 0)


def test_nothing_to_count_is_zero() -> None:
    nothing = torch.full((2, 3), -1)
    assert float(label_cross_entropy(LOGITS, nothing, WEIGHTS)) == 0.0
    assert float(distillation(LOGITS, TEACHER, nothing >= 0, WEIGHTS)) == 0.0
