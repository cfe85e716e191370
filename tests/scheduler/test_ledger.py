import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.counters import SourceCounts, SpeculationSnapshot
from scheduler.ledger import SpeculationLedger
from scheduler.policy import Source

DRAFTER, REPETITION = Source.DRAFTER, Source.REPETITION


def source(ledger: SpeculationLedger, source: Source) -> SourceCounts:
    return ledger.snapshot().counts.sources[source]


def test_a_draft_counts_for_its_source_with_its_length_and_what_was_expected() -> None:
    ledger = SpeculationLedger(4)
    ledger.drafted(REPETITION, 4)
    ledger.admitted("a", REPETITION, 3, [0.9, 0.5, 0.25])
    ledger.verified("a", 3, 2)
    assert source(ledger, REPETITION) == SourceCounts(4, [0, 0, 0, 1, 0], [0, 0, 1, 0, 0], 1.65, 2)
    assert source(ledger, DRAFTER).verify_steps == 0
    assert ledger.snapshot().counts.undrafted_steps == 0


def test_a_draft_that_is_trimmed_behind_the_choice_counts_as_it_was_verified() -> None:
    ledger = SpeculationLedger(4)
    ledger.drafted(DRAFTER, 4)
    ledger.admitted("a", DRAFTER, 4, [0.9, 0.5, 0.25, 0.125])
    ledger.verified("a", 2, 2)
    assert source(ledger, DRAFTER) == SourceCounts(4, [0, 0, 1, 0, 0], [0, 0, 1, 0, 0], 1.4, 2)


def test_a_draft_that_is_lost_is_a_step_without_one() -> None:
    ledger = SpeculationLedger(4)
    ledger.admitted("a", REPETITION, 1, [0.9])
    ledger.verified("a", 0, 0)
    counts = ledger.snapshot().counts
    assert (counts.undrafted_steps, counts.verify_steps, counts.emitted_tokens) == (1, 1, 1)
    assert counts.drafts.expected_tokens == 0


def test_a_choice_holds_for_one_step() -> None:
    ledger = SpeculationLedger(2)
    ledger.admitted("a", REPETITION, 1, [0.9])
    ledger.admitted("a", DRAFTER, 1, [0.5])
    ledger.verified("a", 1, 1)
    ledger.verified("a", 1, 1)  # nobody said what was expected of this one
    assert source(ledger, DRAFTER) == SourceCounts(0, [0, 2, 0], [0, 2, 0], 0.5, 1)
    ledger.admitted("b", REPETITION, 1, [0.9])
    ledger.admitted("b", REPETITION, 0, [])
    ledger.verified("b", 1, 0)
    assert source(ledger, REPETITION).verify_steps == 0


def test_a_draft_without_estimates_counts_for_its_source_all_the_same() -> None:
    ledger = SpeculationLedger(2)
    ledger.admitted("a", REPETITION, 2)
    ledger.verified("a", 2, 1)
    assert source(ledger, REPETITION) == SourceCounts(0, [0, 0, 1], [0, 1, 0], 0.0, 0)


def test_the_end_of_an_answer_is_no_proof_against_what_was_expected() -> None:
    ledger = SpeculationLedger(2)
    ledger.admitted("a", DRAFTER, 2, [0.9, 0.9])
    ledger.verified("a", 2, 1, ended=True)
    assert source(ledger, DRAFTER) == SourceCounts(0, [0, 0, 1], [0, 1, 0], 0.0, 0)


def test_finished_requests_are_forgotten() -> None:
    ledger = SpeculationLedger(2)
    ledger.admitted("a", REPETITION, 1, [0.9])
    ledger.finished("a")
    ledger.finished("never seen")
    ledger.verified("a", 1, 1)
    assert source(ledger, REPETITION).verify_steps == 0
    assert not ledger._chosen


@pytest.mark.parametrize(("verified", "accepted"), [(3, 0), (1, 2), (1, -1), (-1, -1)])
def test_impossible_lengths_are_refused(verified: int, accepted: int) -> None:
    ledger = SpeculationLedger(2)
    with pytest.raises(
        ValueError, match=f"{accepted} accepted of {verified} verified draft tokens of request a; .* 2$"
    ):
        ledger.verified("a", verified, accepted)
    assert ledger.snapshot() == SpeculationLedger(2).snapshot()


def test_steps_are_summed_up_with_their_predictions() -> None:
    ledger = SpeculationLedger(2)
    ledger.step_took(0.5, 0.25)
    ledger.step_took(1.0)
    counts = ledger.snapshot().counts
    assert (counts.steps, counts.measured_seconds, counts.predicted_seconds) == (2, 1.5, 0.25)


def test_errors_are_asked_for_once_in_a_while() -> None:
    ledger, due = SpeculationLedger(2), []
    for _ in range(200):
        ledger.step_took(0.1)
        due.append(ledger.judgement_due)
        if due[-1]:
            ledger.judged(0.1, {})
    assert 2 <= sum(due) <= 5 and not due[0]


def test_errors_are_unknown_at_first() -> None:
    ledger = SpeculationLedger(2)
    ledger.judged(math.nan, {DRAFTER: 0.0625})
    state = ledger.snapshot().state
    assert state.step_time_error is None and state.calibration_errors == [0.0625, None]
    ledger.judged(0.125, {REPETITION: 0.25})
    state = ledger.snapshot().state
    assert state.step_time_error == 0.125 and state.calibration_errors == [0.0625, 0.25]


def test_whether_anything_is_drafted_is_known_from_the_plan() -> None:
    ledger = SpeculationLedger(2)
    assert not ledger.snapshot().state.drafting
    ledger.planned([0, 2])
    assert ledger.snapshot().state.drafting
    ledger.planned([])
    assert ledger.snapshot().state.drafting
    ledger.planned([0, 0])
    assert not ledger.snapshot().state.drafting


def test_a_failed_drafter_shows() -> None:
    ledger = SpeculationLedger(2)
    assert ledger.snapshot().state.drafter_healthy
    ledger.drafter_works(False)
    assert not ledger.snapshot().state.drafter_healthy


def test_a_snapshot_stays_as_it_is() -> None:
    ledger = SpeculationLedger(2)
    before = ledger.snapshot()
    ledger.drafted(DRAFTER, 2)
    ledger.verified("a", 2, 1)
    ledger.verified("a", 0, 0)
    ledger.step_took(1.0, 1.0)
    ledger.judged(0.5, {DRAFTER: 0.5})
    ledger.drafter_works(False)
    ledger.planned([1])
    assert before == SpeculationLedger(2).snapshot() != ledger.snapshot()
    assert isinstance(before, SpeculationSnapshot)


_STEP = st.tuples(
    st.sampled_from(Source), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.booleans(), st.booleans()
)


@given(st.lists(_STEP, max_size=40))
def test_the_counts_are_those_of_the_steps_whatever_was_trimmed(
    script: list[tuple[Source, int, int, int, bool, bool]],
) -> None:
    ledger = SpeculationLedger(5)
    rows = []
    for source_, drafted, kept, right, ended, lost in script:
        ledger.drafted(source_, drafted)
        ledger.admitted("a", source_, drafted, [0.5] * drafted)
        verified = 0 if lost else min(drafted, kept)
        accepted = min(verified, right)
        ledger.verified("a", verified, accepted, ended)
        rows.append((source_, drafted, verified, accepted, ended))
    counts = ledger.snapshot().counts
    assert counts.verify_steps == len(rows)
    assert counts.emitted_tokens == sum(1 + accepted for *_, accepted, _ in rows)
    for each in Source:
        own = [row for row in rows if row[0] is each]
        of = counts.sources[each]
        assert of.drafted_tokens == sum(row[1] for row in own)
        assert of.verified_tokens == sum(row[2] for row in own) and of.accepted_tokens == sum(row[3] for row in own)
        assert of.verified_by_position == [sum(row[2] > k for row in own) for k in range(5)]
        assert of.accepted_by_position == [sum(row[3] > k for row in own) for k in range(5)]
        going_on = [row for row in own if not row[4]]
        assert of.expected_tokens == sum(0.5 * row[2] for row in going_on)
        assert of.realised_tokens == sum(row[3] for row in going_on)
