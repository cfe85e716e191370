import pytest

from scheduler.cost import StepLoad
from scheduler.fixed_policies import AdaptiveDraftLength, BatchTable, FixedLength
from scheduler.policy import Admission, ComingStep, Offer, Source


def coming(requests: int, limits: tuple[int, ...] = ()) -> ComingStep:
    return ComingStep([f"r{row}" for row in range(requests)], [9] * requests, draft_limits=limits)


def offers(requests: int, length: int = 6) -> list[Offer]:
    return [Offer(([0.5] * length, ()))] * requests


def test_a_fixed_length_is_verified_of_the_source_that_promises_more() -> None:
    policy = FixedLength(2)
    assert policy.plan(coming(3)) == [2, 2, 2]
    given = [Offer(([0.9, 0.1, 0.1], [0.5, 0.5, 0.5])), Offer(([0.9, 0.8], [0.9])), Offer()]
    assert policy.admit(coming(3), given) == [
        Admission(2, Source.REPETITION),
        Admission(2, Source.DRAFTER),
        Admission(0, Source.DRAFTER),
    ]


def test_no_more_is_verified_than_is_offered_or_may_be() -> None:
    given = [*offers(3), Offer(([0.9], ()))]
    admitted = FixedLength(4).admit(coming(4, (9, 3, 0, 9)), given)
    assert [admission.tokens for admission in admitted] == [4, 3, 0, 1]


def test_the_offer_is_what_is_believed() -> None:
    given = [Offer(([0.9, 0.4, 0.3], ())), Offer(([0.1], [0.8, 0.7]))]
    assert [list(admission.survival) for admission in FixedLength(2).admit(coming(2), given)] == [
        [0.9, 0.4],
        [0.8, 0.7],
    ]


def test_nothing_at_all_is_a_fixed_length() -> None:
    assert FixedLength(0).plan(coming(2)) == [0, 0]
    assert FixedLength(0).admit(coming(1), offers(1)) == [Admission()]
    with pytest.raises(ValueError, match="must not be negative, but is -1"):
        FixedLength(-1)


@pytest.mark.parametrize(("requests", "length"), [(1, 5), (3, 5), (4, 3), (5, 3), (16, 0), (100, 0)])
def test_a_table_holds_up_to_its_next_entry(requests: int, length: int) -> None:
    policy = BatchTable({16: 0, 1: 5, 4: 3})
    assert policy.plan(coming(requests)) == [length] * requests
    assert policy.admit(coming(requests), offers(requests)) == [Admission(length)] * requests


def test_a_table_answers_for_no_requests() -> None:
    assert BatchTable({1: 5}).plan(coming(0)) == [] and BatchTable({1: 5}).admit(coming(0), []) == []


@pytest.mark.parametrize("lengths", [{}, {2: 3}, {0: 4, 1: 3}, {1: -1}])
def test_a_table_has_to_start_at_one_request(lengths: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="must start at 1 request and hold no negative"):
        BatchTable(lengths)


def test_diffuspecs_lengths_follow_its_formula() -> None:
    policy = AdaptiveDraftLength(least=20, most=30, growth=10)
    assert policy.plan(coming(1)) == [20]
    # Averages of generated and accepted lengths, and what comes of them: floor(generated), + 10 if all was accepted.
    for generated, accepted, length in (
        (20, 20, 30),  # 20, 20
        (30, 10, 25),  # 25, 15
        (25, 25, 25),  # 25, 20
        (4, 4, 20),  # 14.5, 12
        (26, 26, 20),  # 20.25, 19
        (27, 27, 23),  # 23.625, 23
    ):
        policy.verified("r0", generated, accepted)
        assert policy.plan(coming(1)) == [length]
        assert policy.admit(coming(1), offers(1, 40)) == [Admission(length)]


def test_diffuspecs_lengths_never_pass_the_longest() -> None:
    policy = AdaptiveDraftLength(2, 5, 3)
    for _ in range(20):
        policy.verified("r0", 5, 5)
        assert policy.plan(coming(1)) == [5]


def test_diffuspecs_averages_are_each_requests_own_and_end_with_it() -> None:
    policy = AdaptiveDraftLength(2, 8, 3)
    policy.verified("r1", 2, 2)
    policy.verified("r0", 0, 0)
    assert policy.plan(coming(3)) == [2, 5, 2]
    policy.step_took(StepLoad(1, 1, 1, 0, 0), 0.1)
    policy.finished("r1")
    policy.finished("unknown")
    assert policy.plan(coming(3)) == [2, 2, 2]


@pytest.mark.parametrize(
    "arguments", [(0, 5, 1), (6, 5, 1), (1, 5, -1), (1, 5, 1, 0.0), (1, 5, 1, 1.5), (1, 5, 1, float("nan"))]
)
def test_diffuspecs_parameters_are_checked(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="draft lengths must have 0 < least <= most"):
        AdaptiveDraftLength(*arguments)
