import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy import Admission, ComingStep, Offer, Source, SurvivalFloor

PROBABILITY = st.floats(0, 1)


def admitted(floor: float, survival: list[list[float]]) -> list[int]:
    coming = ComingStep([str(row) for row in range(len(survival))], [9] * len(survival))
    admissions = SurvivalFloor(floor, 6).admit(coming, [Offer((row, ())) for row in survival])
    assert all(admission.source is Source.DRAFTER for admission in admissions)
    return [admission.tokens for admission in admissions]


@pytest.mark.parametrize(
    ("floor", "expected"),
    [(0.0, [3, 0, 1]), (0.2, [3, 0, 0]), (0.5, [2, 0, 0]), (0.500001, [1, 0, 0]), (1.0, [0, 0, 0])],
)
def test_tokens_are_admitted_while_their_survival_is_at_least_the_floor(floor: float, expected: list[int]) -> None:
    assert admitted(floor, [[0.9, 0.5, 0.2], [], [0.1]]) == expected


def test_a_certain_token_passes_every_floor() -> None:
    assert admitted(1.0, [[1.0, 1.0, 0.99]]) == [2]


def test_no_requests_admit_nothing() -> None:
    assert admitted(0.5, []) == []


@given(PROBABILITY, st.lists(st.lists(PROBABILITY, max_size=6).map(lambda row: sorted(row, reverse=True)), max_size=5))
def test_as_many_are_admitted_as_lie_above_the_floor(floor: float, survival: list[list[float]]) -> None:
    assert admitted(floor, survival) == [sum(p >= floor for p in row) for row in survival]


@given(st.lists(PROBABILITY, max_size=6), st.lists(PROBABILITY, max_size=6))
def test_later_tokens_never_change_what_is_admitted_before_them(first: list[float], later: list[float]) -> None:
    (shorter,), (longer,) = admitted(0.4, [first]), admitted(0.4, [first + later])
    assert shorter == min(longer, len(first))


def test_of_two_drafts_the_one_that_promises_more_tokens_is_verified() -> None:
    coming = ComingStep(["a", "b", "c"], [9, 9, 9])
    offers = [Offer(([0.9, 0.1], [0.6, 0.5, 0.4])), Offer(([0.9], [0.8])), Offer(((), [0.3]))]
    expected = [Admission(2, Source.REPETITION), Admission(1, Source.DRAFTER), Admission(0, Source.REPETITION)]
    assert SurvivalFloor(0.5, 6).admit(coming, offers) == expected


def test_requests_without_a_limit_have_none() -> None:
    assert ComingStep(["a"], [9]).limit(0) is None
    assert [ComingStep(["a", "b"], [9, 9], draft_limits=[0, 3]).limit(row) for row in (0, 1)] == [0, 3]
