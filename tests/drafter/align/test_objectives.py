import math

import pytest
import torch
import torch.nn.functional as F

from drafter.align.objectives import (
    DraftSlots,
    distillation,
    expected_weights,
    falling_weights,
    label_cross_entropy,
    loss_of,
    missing_overlap,
    streak,
)
from drafter.align.options import Objective

LOGITS = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
TEACHER = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([[0, 4, -1], [2, -1, -1]])
WEIGHTS = torch.tensor([1.0, 0.5, 0.25])


def slots_of(logits: torch.Tensor = LOGITS, labels: torch.Tensor = LABELS) -> DraftSlots:
    return DraftSlots(logits, TEACHER, labels, labels >= 0)


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
    assert float(label_cross_entropy(slots_of(), WEIGHTS)) == pytest.approx(total / weight, rel=1e-5)


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
    assert float(distillation(slots_of(), WEIGHTS)) == pytest.approx(total / weight, rel=1e-5)


def test_distillation_is_least_where_the_teacher_is() -> None:
    logits = TEACHER.clone().requires_grad_()
    distillation(slots_of(logits, LABELS.abs()), WEIGHTS).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


def test_slots_that_do_not_count_have_no_gradient() -> None:
    for objective in Objective:
        logits = LOGITS.clone().requires_grad_()
        loss_of(objective, slots_of(logits), 3.0, 0.5).backward()
        assert logits.grad is not None
        assert torch.equal(logits.grad.abs().amax(-1) > 0, LABELS >= 0), objective


def test_nothing_to_count_has_no_gradient() -> None:
    nothing = torch.full((2, 3), -1)
    assert float(label_cross_entropy(slots_of(labels=nothing), WEIGHTS)) == 0.0
    assert float(distillation(slots_of(labels=nothing), WEIGHTS)) == 0.0
    for objective in Objective:
        logits = LOGITS.clone().requires_grad_()
        loss_of(objective, slots_of(logits, nothing), 3.0, 0.5).backward()
        assert logits.grad is not None and not logits.grad.any(), objective


def chances() -> list[list[float]]:
    """Of each label that counts."""
    return [
        [math.exp(log_probability(LOGITS[block, slot], int(label))) for slot, label in enumerate(row) if label >= 0]
        for block, row in enumerate(LABELS)
    ]


def test_expected_weights_are_the_tokens_that_hang_on_a_slot() -> None:
    (first, second), (alone,) = ([0.5 + 0.5 * chance for chance in row] for row in chances())
    hanging = [first + first * second, first * second]
    assert expected_weights(slots_of())[0].tolist() == pytest.approx([1.0, hanging[1] / hanging[0], 0.0])
    assert expected_weights(slots_of())[1].tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert alone > 0.5


def test_a_streak_ends_with_its_first_miss() -> None:
    (first, second), (alone,) = chances()
    assert float(streak(slots_of())) == pytest.approx(1 - (first + first * second + alone) / 3, rel=1e-5)
    late = torch.tensor([[-1, 4, 2], [-1, -1, -1]])
    assert float(streak(slots_of(labels=late))) == 1.0


def test_overlap_is_what_a_sampled_draft_is_accepted_with() -> None:
    drafter, teacher = LOGITS.softmax(-1), TEACHER.softmax(-1)
    common = torch.minimum(drafter, teacher).sum(-1)
    expected = ((1 - common) * WEIGHTS * (LABELS >= 0)).sum() / (WEIGHTS * (LABELS >= 0)).sum()
    assert float(missing_overlap(slots_of(), WEIGHTS)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("objective", Objective)
def test_every_objective_leads_to_the_target(objective: Objective) -> None:
    """Whose distribution is sure enough here that its most likely tokens and its distribution are the same aim."""
    teacher = 8 * F.one_hot(LABELS.clamp(min=0), 5).float()
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(objective, DraftSlots(logits, teacher, LABELS, LABELS >= 0), 3.0, 0.5).backward()
        optimizer.step()
    assert torch.equal(logits.argmax(-1)[LABELS >= 0], LABELS[LABELS >= 0])
