import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.counters import SpeculationHistory, SpeculationTotals


def totals(steps: int, drafted: int, verified: list[int], accepted: list[int]) -> SpeculationTotals:
    return SpeculationTotals(steps, drafted, verified, accepted)


def test_nothing_was_counted_at_first() -> None:
    empty = SpeculationTotals()
    assert (empty.verified_tokens, empty.accepted_tokens, empty.emitted_tokens) == (0, 0, 0)


def test_every_verify_step_emits_one_token_more_than_it_accepts() -> None:
    counted = totals(10, 50, [9, 7, 4], [6, 3, 1])
    assert (counted.verified_tokens, counted.accepted_tokens, counted.emitted_tokens) == (20, 10, 20)


def test_positions_are_added_up_however_many_there_are() -> None:
    counted = SpeculationTotals()
    counted.add(2, [2, 1], [1])
    counted.add(1, [1, 1, 1], [1, 1, 1])
    counted.add(1, [], [])
    assert counted == totals(4, 0, [3, 2, 1], [2, 1, 1])


def test_since_leaves_what_came_later() -> None:
    earlier, later = totals(2, 8, [2, 1], [1]), totals(5, 20, [5, 3, 1], [3, 1, 1])
    assert later.since(earlier) == totals(3, 12, [3, 2, 1], [2, 1, 1])


def test_a_copy_is_independent() -> None:
    counted = totals(1, 4, [1, 1], [1, 0])
    copy = counted.copy()
    assert copy == counted
    counted.add(1, [1, 1], [1, 1])
    counted.verified_by_position.append(9)
    assert copy == totals(1, 4, [1, 1], [1, 0])


def test_the_history_knows_totals_and_the_last_minute() -> None:
    history = SpeculationHistory()
    history.add(100.0, 1, [1], [1])
    history.add(130.0, 2, [2], [0])
    history.add(161.0, 4, [4], [4])
    assert history.totals == totals(7, 0, [7], [5])
    assert history.recent(161.0) == totals(6, 0, [6], [4])
    assert history.recent(190.5) == totals(4, 0, [4], [4])
    assert history.recent(221.5) == SpeculationTotals()
    assert history.totals == totals(7, 0, [7], [5])


def test_a_history_without_counts_has_no_recent_ones() -> None:
    assert SpeculationHistory().recent(5.0) == SpeculationTotals()


def test_drafted_tokens_are_the_drafters_own_count() -> None:
    history = SpeculationHistory()
    history.set_drafted(10.0, 100)
    history.set_drafted(50.0, 150)
    history.set_drafted(75.0, 155)
    assert history.totals.drafted_tokens == 155
    assert history.recent(75.0).drafted_tokens == 55
    assert history.recent(115.0).drafted_tokens == 5


def test_counts_within_one_second_share_a_copy() -> None:
    history = SpeculationHistory(window=10.0)
    for step in range(1000):
        history.add(step / 100, 1, [1], [0])
    assert len(history._copies) <= 11
    assert history.recent(10.0).verify_steps == 1000


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 3)), max_size=30).map(
        lambda steps: [(sum(pause for pause, _ in steps[: i + 1]), count) for i, (_, count) in enumerate(steps)]
    ),
    st.floats(0, 80),
)
def test_recent_counts_are_right_to_the_second(steps: list[tuple[float, int]], pause: float) -> None:
    history = SpeculationHistory(window=60.0)
    for now, count in steps:
        history.add(now, count, [count], [])
    now = (steps[-1][0] if steps else 0.0) + pause
    surely = sum(count for at, count in steps if at > now - 59.0 + 1e-6)
    possibly = sum(count for at, count in steps if at >= now - 60.0 - 1e-6)
    assert surely <= history.recent(now).verify_steps <= possibly


@pytest.mark.parametrize("window", [1.0, 5.0])
def test_the_window_can_be_chosen(window: float) -> None:
    history = SpeculationHistory(window)
    for second in range(20):
        history.add(float(second), 1, [], [])
    assert history.recent(19.0).verify_steps == window + 1
