import torch

from drafter.pending import MOST_ROWS, PendingForwards, context_of
from drafter.types import TargetForward
from tests.drafter.test_ngram import Run, target_forward


def forward(slots: list[int], value: float = 0.0) -> TargetForward:
    """A pass over as many tokens as there are slots, with hidden states of two layers."""
    made = target_forward([Run("a", 0, list(range(len(slots))), len(slots))])
    states = [torch.full((len(slots), 2), value), torch.full((len(slots), 3), -value)]
    return replaced(made, slot_mapping=torch.tensor(slots), hidden_states=states)


def replaced(made: TargetForward, **changes: object) -> TargetForward:
    from dataclasses import replace

    return replace(made, **changes)  # type: ignore[arg-type]


def test_passes_are_collected_in_order() -> None:
    pending = PendingForwards()
    for slots, value in (([4], 1.0), ([5, 6], 2.0)):
        each = forward(slots, value)
        assert pending.accepts(each)
        pending.add(each)
    hidden, positions, mapping = context_of(pending.take())
    assert hidden.tolist() == [[1, 1, -1, -1, -1], *[[2, 2, -2, -2, -2]] * 2]
    assert positions.tolist() == [0, 0, 1] and mapping.tolist() == [4, 5, 6]
    assert pending.rows == 0 and pending.take() == []


def test_a_slot_that_is_run_again_waits_for_the_first_time_to_be_written() -> None:
    pending = PendingForwards()
    pending.add(forward([4, 5]))
    assert not pending.accepts(forward([5]))
    assert pending.accepts(forward([6]))
    pending.take()
    assert pending.accepts(forward([5]))


def test_rows_that_are_not_written_get_in_nobodys_way() -> None:
    pending = PendingForwards()
    pending.add(forward([-1]))
    assert pending.accepts(forward([-1]))


def test_it_is_full_at_some_point() -> None:
    pending = PendingForwards()
    for row in range(MOST_ROWS):
        assert not pending.is_full
        pending.add(forward([row]))
    assert pending.is_full
    pending.take()
    assert not pending.is_full
