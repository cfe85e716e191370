from itertools import product

import numpy as np
import numpy.typing as npt
import pytest

from scheduler.cost import StepLoad
from scheduler.oracle import Oracle
from scheduler.policy import Admission, ComingStep, Offer, Source

SLOTS = 3


class Cost:
    """A machine whose rows cost nothing up to a knee."""

    def __init__(self, knee: int = 4, row: float = 0.5, drafting: float = 0.0):
        self._knee, self._row, self._drafting = knee, row, drafting

    def seconds_by_tokens(self, tokens: npt.NDArray[np.int64], rest: StepLoad) -> npt.NDArray[np.float64]:
        seconds: npt.NDArray[np.float64] = 1 + self._row * np.maximum(tokens - self._knee, 0.0)
        return seconds + self._drafting * rest.drafted_slots


def coming(requests: int, limits: tuple[int, ...] = ()) -> ComingStep:
    return ComingStep([f"r{row}" for row in range(requests)], [9] * requests, draft_limits=limits)


def offer(length: int = SLOTS, source: Source = Source.DRAFTER) -> Offer:
    survival = [0.5] * length
    return Offer((survival, []) if source is Source.DRAFTER else ([], survival))


def admitted(oracle: Oracle, truth: list[list[float]], offers: list[Offer], limits: tuple[int, ...] = ()) -> list[int]:
    oracle.reveal(np.array(truth))
    return [admission.tokens for admission in oracle.admit(coming(len(offers), limits), offers)]


def test_the_first_step_has_the_most_tokens_per_second() -> None:
    truth = [[0.9, 0.8, 0.1], [0.6, 0.3, 0.2], [1.0, 0.2, 0.0]]
    cost = Cost(knee=3, row=0.2)
    lengths = admitted(Oracle(cost, SLOTS), truth, [offer()] * 3)

    def rate(choice: tuple[int, ...]) -> float:
        emitted = 3 + sum(sum(row[:length]) for row, length in zip(truth, choice, strict=True))
        return emitted / float(cost.seconds_by_tokens(np.array([3 + sum(choice)]), StepLoad(3, 3, 27, 0, 0))[0])

    assert rate(tuple(lengths)) == max(map(rate, product(range(SLOTS + 1), repeat=3)))
    assert lengths == [2, 0, 1]


def test_later_steps_are_worth_their_time_at_the_rate_of_all() -> None:
    # One request, free up to 2 rows, a row more takes 0.5. At 1 token a second even 0.6 of a token is worth it; its
    # own tokens per second, 1.9 a second against 2.5 in 1.5, would say no.
    oracle = Oracle(Cost(knee=2), SLOTS)
    for _ in range(50):
        oracle.step_took(StepLoad(1, 1, 9, 0, 0), 1.0)
    assert admitted(oracle, [[0.9, 0.6, 0.4]], [offer()]) == [2]


def test_tokens_that_were_accepted_raise_the_rate() -> None:
    oracle = Oracle(Cost(knee=2), SLOTS)
    for _ in range(500):
        oracle.verified("r0", 3, 1)
        oracle.step_took(StepLoad(1, 1, 9, 0, 0), 1.0)
    # At 2 tokens a second a row's 0.5 seconds have to bring one token.
    assert admitted(oracle, [[0.9, 0.8, 0.7]], [offer()]) == [1]
    assert admitted(Oracle(Cost(knee=2, row=0.3), SLOTS), [[0.9, 0.8, 0.7]], [offer()]) == [3]


def test_what_is_not_offered_or_must_not_be_verified_is_not_admitted() -> None:
    oracle = Oracle(Cost(knee=100), SLOTS)
    assert admitted(oracle, [[1.0, 1.0, 1.0]] * 4, [offer(), offer(1), offer(0), offer()], (3, 3, 3, 2)) == [3, 1, 0, 2]


def test_the_truth_is_what_is_believed() -> None:
    oracle = Oracle(Cost(knee=3), SLOTS)
    oracle.reveal(np.array([[0.9, 0.8, 0.1]]))
    (admission,) = oracle.admit(coming(1), [offer()])
    assert (admission.tokens, list(admission.survival)) == (2, [0.9, 0.8])


def test_the_source_is_that_of_the_offer() -> None:
    oracle = Oracle(Cost(knee=100), SLOTS)
    oracle.reveal(np.ones((2, SLOTS)))
    assert oracle.admit(coming(2), [offer(source=Source.REPETITION), offer()]) == [
        Admission(3, Source.REPETITION),
        Admission(3, Source.DRAFTER),
    ]
    assert oracle.admit(coming(0), []) == []


@pytest.mark.parametrize(
    ("truth", "drafting", "length"),
    [
        ([0.9, 0.8, 0.7], 0.0, 3),
        ([0.9, 0.8, 0.7], 5.0, 0),
        ([0.9, 0.8, 0.0], 0.1, 2),
        ([0.9, 0.05, 0.0], 0.1, 1),
        ([0.0, 0.0, 0.0], 0.1, 0),
    ],
)
def test_drafts_are_as_long_as_was_worth_their_time(truth: list[float], drafting: float, length: int) -> None:
    oracle = Oracle(Cost(knee=100, drafting=drafting), SLOTS)
    assert oracle.plan(coming(2)) == [SLOTS, SLOTS]
    for _ in range(5):
        oracle.step_took(StepLoad(2, 2, 18, 0, 0), 1.0)
        admitted(oracle, [truth, truth], [offer(), offer()])
    assert oracle.plan(coming(2)) == [length, length]


def test_repetitions_need_no_drafter() -> None:
    oracle = Oracle(Cost(knee=100, drafting=0.1), SLOTS)
    for _ in range(5):
        oracle.step_took(StepLoad(1, 1, 9, 0, 0), 1.0)
        assert admitted(oracle, [[0.9, 0.8, 0.7]], [offer(source=Source.REPETITION)]) == [3]
    assert oracle.plan(coming(1)) == [0]


def test_drafting_comes_back_soon_when_it_would_have_been_worth_it() -> None:
    oracle = Oracle(Cost(knee=1000, drafting=0.1), SLOTS)
    # What was long ago is forgotten: 250 useless steps do not need as many good ones.
    for right, steps, length in ((0.0, 250, 0), (0.9, 2, 0), (0.9, 20, SLOTS)):
        for _ in range(steps):
            oracle.step_took(StepLoad(16, 16, 144, 0, 0), 16.0)
            admitted(oracle, [[right] * SLOTS] * 16, [offer(oracle.plan(coming(16))[0])] * 16)
        assert oracle.plan(coming(16)) == [length] * 16
    oracle.finished("r0")
