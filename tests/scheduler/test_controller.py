"""The controller against exhaustive search and against made-up machines."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.controller import DraftController, choose
from scheduler.cost import StepLoad


class Machine:
    """Steps cost ``fixed`` and, from ``free`` rows on, ``per_row`` each; drafting costs ``per_draft`` a request."""

    def __init__(self, fixed: float = 10.0, per_row: float = 1.0, free: int = 0, per_draft: float = 0.0):
        self.fixed, self.per_row, self.free, self.per_draft = fixed, per_row, free, per_draft

    def seconds_by_tokens(self, tokens: np.ndarray, rest: StepLoad) -> np.ndarray:
        rows: np.ndarray = np.maximum(np.asarray(tokens, dtype=np.float64) - self.free, 0)
        return self.fixed + self.per_row * rows + self.per_draft * rest.drafted_requests


def load(requests: int, tokens: int | None = None) -> StepLoad:
    return StepLoad(requests if tokens is None else tokens, requests, 100 * requests, 0, 0)


def rows(*rows: list[float]) -> np.ndarray:
    """Survival, padded."""
    slots = max((len(row) for row in rows), default=0)
    return np.array([row + [0.0] * (slots - len(row)) for row in rows]).reshape(len(rows), slots)


def rate(machine: Machine, survival: np.ndarray, counts: tuple[int, ...]) -> float:
    emitted = len(survival) + sum(float(row[:count].sum()) for row, count in zip(survival, counts, strict=True))
    seconds = machine.seconds_by_tokens(np.array([len(survival) + sum(counts)]), load(len(survival)))
    return emitted / float(seconds[0])


SURVIVAL = st.lists(
    st.lists(st.floats(0.001, 1), max_size=4).map(lambda row: np.cumprod(row).tolist()), min_size=1, max_size=4
)


@settings(max_examples=300, deadline=None)
@given(SURVIVAL, st.floats(0.1, 20), st.floats(0.01, 5), st.integers(0, 8))
def test_no_other_choice_emits_more_tokens_per_second(
    drafts: list[list[float]], fixed: float, per_row: float, free: int
) -> None:
    machine, survival = Machine(fixed, per_row, free), rows(*drafts)
    choice = choose(survival, load(len(drafts)), machine)
    counts = [range(len(row) + 1) for row in drafts]
    best = max(rate(machine, survival, each) for each in itertools.product(*counts))
    assert rate(machine, survival, tuple(choice.admitted)) == pytest.approx(best, rel=1e-9)
    assert choice.emitted / choice.seconds == pytest.approx(best, rel=1e-9)


def test_what_is_free_is_all_verified_and_what_is_dear_is_not() -> None:
    survival = rows([0.9, 0.5, 0.1], [0.3, 0.2, 0.01])
    assert choose(survival, load(2), Machine(free=8)).admitted == [3, 3]
    assert choose(survival, load(2), Machine(fixed=0.0)).admitted == [0, 0]


def test_the_likelier_tokens_go_first_whoevers_they_are() -> None:
    machine = Machine(fixed=10, per_row=2.5)
    assert choose(rows([0.9, 0.8], [0.7, 0.1], [0.2]), load(3), machine).admitted == [2, 1, 0]


def test_of_equal_tokens_those_of_earlier_requests_go_first() -> None:
    class OneMore(Machine):
        def seconds_by_tokens(self, tokens: np.ndarray, rest: StepLoad) -> np.ndarray:
            return np.where(np.asarray(tokens) <= 5, 1.0, 100.0)

    assert choose(rows([0.5], [0.5], [0.5]), load(3), OneMore()).admitted == [1, 1, 0]


def test_no_drafts_and_no_requests_are_legal() -> None:
    assert choose(np.zeros((2, 0)), load(2), Machine()).admitted == [0, 0]
    assert choose(np.zeros((2, 3)), load(2), Machine()).admitted == [0, 0]
    assert choose(np.zeros((0, 3)), load(0, tokens=9), Machine()).admitted == []


def test_prompts_beside_make_rows_dear_and_their_own_time_does_not_count() -> None:
    """Up to the knee rows are free; a prompt has used that up."""
    machine, survival = Machine(fixed=10, per_row=4, free=8), rows([0.35])
    assert choose(survival, load(1), machine).admitted == [1]
    for tokens in (9, 65, 900):
        assert choose(survival, load(1, tokens), machine).admitted == [0]
        assert choose(rows([0.45]), load(1, tokens), machine).admitted == [1]


# When to draft


def run(
    controller: DraftController, machine: Machine, draft: np.ndarray, steps: int, requests: int = 1
) -> list[list[int]]:
    """Plans of so many steps in which drafts come out as ``draft`` ``[slots]`` says."""
    plans = []
    names = [f"r{i}" for i in range(requests)]
    for _ in range(steps):
        plan = controller.plan(names, load(requests))
        plans.append(plan)
        survival = np.stack([np.where(np.arange(len(draft)) < length, draft, 0) for length in plan])
        drafted = {name: row for name, row, length in zip(names, survival, plan, strict=True) if length}
        controller.admit(survival, drafted, load(requests))
    return plans


GOOD, BAD = np.array([0.9, 0.7, 0.5, 0.3]), np.array([0.02, 0.001, 0.0001, 0.0001])


def test_good_drafts_go_on() -> None:
    machine = Machine(per_draft=3)
    assert all(sum(plan) for plan in run(DraftController(machine, 4), machine, GOOD, 100))


@pytest.mark.parametrize("requests", [1, 3, 20])
def test_drafting_stops_when_nothing_is_accepted_but_for_cheap_probes(requests: int) -> None:
    machine = Machine(per_draft=3)
    plans = run(DraftController(machine, 4), machine, BAD, 400, requests)
    probes = [plan for plan in plans[20:] if sum(plan)]
    assert 8 <= len(probes) <= 20
    assert all(sum(length > 0 for length in plan) == 1 for plan in probes)


def test_drafting_stops_when_it_costs_more_than_it_brings() -> None:
    dear = Machine(per_draft=30)
    assert sum(sum(plan) > 0 for plan in run(DraftController(dear, 4), dear, GOOD, 200)) < 30


def test_drafting_comes_back_within_two_hundred_and_fifty_steps() -> None:
    machine = Machine(per_draft=3)
    controller = DraftController(machine, 4)
    run(controller, machine, BAD, 300)
    plans = run(controller, machine, GOOD, 300)
    assert all(sum(plan) for plan in plans[250:])


def test_drafting_is_tried_again_when_all_evidence_has_lapsed() -> None:
    """Drafts may come out empty for long, as where an answer could end with each."""
    machine = Machine(per_draft=3)
    controller = DraftController(machine, 4)
    run(controller, machine, BAD, 100)
    plans = [controller.plan(["r0"], load(1)) for _ in range(300)]
    assert plans[50] == [0] and plans[-1] == [4]


def test_drafts_are_no_longer_than_what_is_verified_of_them() -> None:
    machine = Machine(fixed=10, per_row=3, per_draft=1)
    short = np.array([0.9, 0.1, 0.01, 0.001])
    lengths = [length for (length,) in run(DraftController(machine, 4), machine, short, 200)[20:]]
    assert max(lengths) == 2, "now and then one more is tried"
    assert lengths.count(1) > 120


def test_what_was_drafted_short_does_not_speak_against_longer_drafts() -> None:
    machine = Machine(fixed=10, per_row=0.5, per_draft=1)
    controller = DraftController(machine, 4)
    run(controller, machine, BAD, 100)
    assert run(controller, machine, np.array([0.95, 0.9, 0.85, 0.8]), 300)[-1] == [4]


def test_a_few_hard_drafts_do_not_stop_what_pays_on_average() -> None:
    """Half of the drafts promise nothing, as in text that is easy here and hard there."""
    machine, random = Machine(fixed=10, per_row=1, per_draft=2), np.random.default_rng(0)
    controller = DraftController(machine, 4)
    drafted = 0
    for _ in range(1000):
        draft = GOOD if random.random() < 0.5 else BAD
        drafted += sum(run(controller, machine, draft, 1)[0]) > 0
    assert drafted > 950


def test_a_floor_is_drafted_and_verified_whatever_it_brings() -> None:
    machine = Machine(per_draft=3)
    controller = DraftController(machine, 4, least=2)
    assert run(controller, machine, BAD, 100)[-1] == [2]
    assert controller.admit(rows(BAD.tolist()), {"r0": BAD}, load(1)).admitted == [2]


def test_nobody_to_draft_for() -> None:
    assert DraftController(Machine(), 4).plan([], load(0)) == []


def test_probes_are_verified() -> None:
    machine = Machine(per_draft=3)
    controller = DraftController(machine, 4)
    run(controller, machine, BAD, 100)
    while not sum(controller.plan(["r0"], load(1))):
        pass
    assert controller.admit(rows(BAD.tolist()), {"r0": BAD}, load(1)).admitted == [1]
