import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.counters import SourceCounts, SpeculationCounts, SpeculationHistory, SpeculationSnapshot
from scheduler.policy import Source


def counted(undrafted: int, drafter: SourceCounts | None = None, **numbers: float) -> SpeculationCounts:
    return SpeculationCounts(undrafted, [drafter or SourceCounts(), SourceCounts()], **numbers)  # type: ignore[arg-type]


def steps(count: int) -> SpeculationSnapshot:
    return SpeculationSnapshot(counted(count))


def test_nothing_was_counted_at_first() -> None:
    empty = SpeculationCounts()
    assert (empty.verify_steps, empty.emitted_tokens, empty.drafts) == (0, 0, SourceCounts())


def test_lengths_say_everything_about_a_source() -> None:
    source = SourceCounts(20, [0, 2, 1, 3], [1, 3, 2, 0])
    assert source.verify_steps == 6
    assert source.verified_tokens == 2 * 1 + 1 * 2 + 3 * 3
    assert source.accepted_tokens == 3 * 1 + 2 * 2
    assert source.emitted_tokens == 6 + 7
    assert source.verified_by_position == [6, 4, 3]
    assert source.accepted_by_position == [5, 2, 0]


def test_steps_without_a_draft_emit_one_token_and_belong_to_no_source() -> None:
    counts = counted(4, SourceCounts(9, [0, 0, 3], [1, 1, 1]))
    assert (counts.verify_steps, counts.emitted_tokens) == (7, 4 + 3 + 3)
    assert counts.steps_by_length == [4, 0, 3]
    assert counts.drafts.verify_steps == 3


def test_sources_are_added_up_however_long_their_drafts_are() -> None:
    drafter, repetition = SourceCounts(5, [0, 1], [1, 0], 0.5, 0), SourceCounts(9, [0, 0, 2], [0, 1, 1], 2.5, 3)
    counts = SpeculationCounts(1, [drafter, repetition])
    assert counts.drafts == SourceCounts(14, [0, 1, 2], [1, 1, 1], 3.0, 3)
    assert counts.steps_by_length == [1, 1, 2]


def test_since_leaves_what_came_later() -> None:
    earlier = counted(2, SourceCounts(8, [0, 2], [1, 1], 0.5, 1), steps=3, measured_seconds=1.0, predicted_seconds=2.0)
    later = counted(
        5, SourceCounts(20, [0, 3, 1], [2, 1, 1], 2.0, 3), steps=7, measured_seconds=1.5, predicted_seconds=4
    )
    assert later.since(earlier) == counted(
        3, SourceCounts(12, [0, 1, 1], [1, 0, 1], 1.5, 2), steps=4, measured_seconds=0.5, predicted_seconds=2.0
    )


def test_a_copy_is_independent() -> None:
    counts = SpeculationCounts.of_slots(2)
    copy = counts.copy()
    assert copy == counts
    counts.sources[Source.REPETITION].verified_lengths[2] += 1
    counts.sources[Source.DRAFTER].drafted_tokens += 1
    counts.steps += 1
    assert copy == SpeculationCounts.of_slots(2)


def test_every_source_has_lists_of_its_own() -> None:
    counts = SpeculationCounts.of_slots(1)
    lists = [lengths for each in counts.sources for lengths in (each.verified_lengths, each.accepted_lengths)]
    assert lists == [[0, 0]] * 4 and len({id(each) for each in lists}) == 4


def test_the_history_knows_totals_and_the_last_minute() -> None:
    history = SpeculationHistory()
    history.record(100.0, steps(1))
    history.record(130.0, steps(3))
    history.record(161.0, steps(7))
    assert history.latest == steps(7)
    assert history.recent(161.0).verify_steps == 6
    assert history.recent(190.5).verify_steps == 4
    assert history.recent(221.5) == SpeculationCounts()
    assert history.latest == steps(7)


def test_a_history_without_counts_has_no_recent_ones() -> None:
    assert SpeculationHistory().recent(5.0) == SpeculationCounts()


def test_snapshots_within_one_second_share_an_entry() -> None:
    history = SpeculationHistory(window=10.0)
    for step in range(1000):
        history.record(step / 100, steps(step + 1))
    assert len(history._earlier) <= 11
    assert history.recent(10.0).verify_steps == 1000


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 3)), max_size=30).map(
        lambda events: [(sum(pause for pause, _ in events[: i + 1]), count) for i, (_, count) in enumerate(events)]
    ),
    st.floats(0, 80),
)
def test_recent_counts_are_right_to_the_second(events: list[tuple[float, int]], pause: float) -> None:
    history, total = SpeculationHistory(window=60.0), 0
    for now, count in events:
        total += count
        history.record(now, steps(total))
    now = (events[-1][0] if events else 0.0) + pause
    surely = sum(count for at, count in events if at > now - 59.0 + 1e-6)
    possibly = sum(count for at, count in events if at >= now - 60.0 - 1e-6)
    assert surely <= history.recent(now).verify_steps <= possibly


@pytest.mark.parametrize("window", [1.0, 5.0])
def test_the_window_can_be_chosen(window: float) -> None:
    history = SpeculationHistory(window)
    for second in range(20):
        history.record(float(second), steps(second + 1))
    assert history.recent(19.0).verify_steps == window + 1
