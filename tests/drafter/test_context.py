from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from drafter.context import ContextKeeper, EagerContext, LazyContext, WrittenContext, context_keeper
from drafter.serving import ServingDrafter
from drafter.types import PagedCacheSpec, TargetForward
from tests.drafter.test_ngram import Run, target_forward
from tests.drafter.tiny import random_drafter, random_target, shift_config

PAGES, PAGE_SIZE = 6, 4


def states(slots: Sequence[int], value: int = 0) -> torch.Tensor:
    """Hidden states ``[slots, feature_size]`` that tell slots and values apart, of moderate size."""
    width = torch.arange(shift_config().feature_size)
    return ((torch.tensor(slots)[:, None] * 7 + width * 3 + value * 5) % 16 - 8) / 8


def forward(requests: dict[str, tuple[list[int], int, int]], value: int = 0) -> TargetForward:
    """A pass: of each request its pages, how many tokens were computed before, and how many are now."""
    runs = [Run(name, before, list(range(now - before)), now) for name, (_, before, now) in requests.items()]
    slots = [
        pages[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE
        for pages, before, now in requests.values()
        for place in range(before, now)
    ]
    longest = max(len(pages) for pages, _, _ in requests.values())
    tables = [pages + [0] * (longest - len(pages)) for pages, _, _ in requests.values()]
    return replace(
        target_forward(runs),
        slot_mapping=torch.tensor(slots),
        block_table=torch.tensor(tables, dtype=torch.int32),
        hidden_states=list(states(slots, value).chunk(len(shift_config().hidden_state_layers), dim=1)),
    )


class Kept:
    """A keeper and the K/V that are right, written at once."""

    def __init__(self) -> None:
        self.serving, self.expected = serving(), serving()
        self.keeper: ContextKeeper = LazyContext(self.serving, PagedCacheSpec(PAGES, PAGE_SIZE))
        self._eager = EagerContext(self.expected)

    def take(self, made: TargetForward, drafted: list[int]) -> WrittenContext:
        with torch.inference_mode():
            everything = self._eager.take(made, drafted)
            taken = self.keeper.take(made, drafted)
        if drafted:
            torch.testing.assert_close(taken.last_features, everything.last_features, rtol=1e-5, atol=1e-6)
        return taken

    def written(self, pages: list[int]) -> bool:
        """Whether pages are as they should be; they do not start so."""
        return all(
            torch.allclose(mine[pages], right[pages], rtol=1e-4, atol=1e-5)
            for mine, right in zip(self.serving.pages, self.expected.pages, strict=True)
        )


def serving() -> ServingDrafter:
    return ServingDrafter(random_drafter(shift_config()), random_target(), PagedCacheSpec(PAGES, PAGE_SIZE))


def test_nothing_is_written_before_a_draft_needs_it() -> None:
    kept = Kept()
    assert kept.take(forward({"a": ([2, 1], 0, 6), "b": ([3], 0, 3)}), []).rows == 0
    assert not kept.written([2]) and not kept.written([3])
    taken = kept.take(forward({"a": ([2, 1], 6, 7), "b": ([3], 3, 4)}), [0])
    assert (taken.rows, taken.late_rows) == (7, 6)
    assert kept.written([2, 1]) and not kept.written([3])
    assert kept.keeper.settle() == 4
    assert kept.written([1, 2, 3]) and kept.keeper.settle() == 0


def test_what_is_drafted_behind_every_pass_is_never_late() -> None:
    kept = Kept()
    for before, now in ((0, 3), (3, 4), (4, 7)):
        taken = kept.take(forward({"a": ([5, 4], before, now)}), [0])
        assert (taken.rows, taken.late_rows) == (now - before, 0)
        assert kept.written([5, 4])


def test_of_a_slot_that_is_run_again_the_last_time_counts() -> None:
    kept = Kept()
    kept.take(forward({"a": ([1], 0, 3)}, value=1), [])
    kept.take(forward({"a": ([1], 1, 4)}, value=2), [0])
    assert kept.written([1])


def test_the_next_owner_of_a_page_finds_nothing_of_the_last_one() -> None:
    kept = Kept()
    kept.take(forward({"a": ([1, 2], 0, 8)}, value=1), [])
    taken = kept.take(forward({"b": ([1], 0, 2)}, value=2), [0])
    assert (taken.rows, taken.late_rows) == (2, 0)  # the other slots hold what does not belong to its context
    kept.take(forward({"b": ([1], 2, 4)}, value=2), [0])
    assert kept.written([1])


def test_pages_that_several_requests_share_are_written_once() -> None:
    kept = Kept()
    kept.take(forward({"a": ([1], 0, 4)}), [])
    taken = kept.take(forward({"b": ([1, 2], 4, 6), "c": ([1, 3], 4, 5)}), [0, 1])
    assert (taken.rows, taken.late_rows) == (7, 4)
    assert kept.written([1, 2, 3])


def test_rows_without_a_slot_are_left_out() -> None:
    kept = Kept()
    made = forward({"a": ([1], 0, 3)})
    kept.take(replace(made, slot_mapping=torch.tensor([-1, 5, 6])), [])
    assert kept.keeper.settle() == 2


@pytest.mark.parametrize(("device", "kind"), [("cpu", LazyContext), ("meta", EagerContext)])
def test_only_on_a_cpu_it_waits(device: str, kind: type) -> None:
    assert isinstance(context_keeper(serving(), PagedCacheSpec(PAGES, PAGE_SIZE, torch.device(device))), kind)
