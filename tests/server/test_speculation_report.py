import time

from scheduler.counters import SpeculationSnapshot, SpeculationState
from server.speculation_report import SpeculationReport
from tests.server.speculation_counts import counted, speculation_source


def test_totals_tell_steps_drafts_and_positions() -> None:
    report = SpeculationReport.of(speculation_source(counted())).model_dump()
    total = report["since_start"]
    sources = total.pop("sources")
    assert total == {
        "verify_steps": 16,
        "drafted_tokens": 46,
        "verified_tokens": 28,
        "accepted_tokens": 15,
        "emitted_tokens": 31,
        "emitted_per_verify_step": 1.9375,
        "acceptance_rate": 0.5357,
        "expected_accepted_tokens": 13.75,
        "realised_accepted_tokens": 13,
        "positions": [
            {"position": 0, "verified": 14, "accepted": 9, "acceptance_rate": 0.6429},
            {"position": 1, "verified": 9, "accepted": 4, "acceptance_rate": 0.4444},
            {"position": 2, "verified": 5, "accepted": 2, "acceptance_rate": 0.4},
        ],
        "draft_lengths": [2, 5, 4, 5],
        "steps": 12,
        "measured_step_seconds": 1.5,
        "predicted_step_seconds": 1.25,
    }
    assert sources["repetition"] == {
        "verify_steps": 4,
        "drafted_tokens": 6,
        "verified_tokens": 6,
        "accepted_tokens": 5,
        "emitted_tokens": 9,
        "acceptance_rate": 0.8333,
        "expected_accepted_tokens": 4.25,
        "realised_accepted_tokens": 5,
        "positions": [
            {"position": 0, "verified": 4, "accepted": 3, "acceptance_rate": 0.75},
            {"position": 1, "verified": 1, "accepted": 1, "acceptance_rate": 1.0},
            {"position": 2, "verified": 1, "accepted": 1, "acceptance_rate": 1.0},
        ],
    }
    assert sources["drafter"]["verified_tokens"] == 22 and sources["drafter"]["emitted_tokens"] == 20
    assert sources.keys() == {"drafter", "repetition"}


def test_the_state_of_now_is_told() -> None:
    report = SpeculationReport.of(speculation_source(counted()))
    assert (report.enabled, report.drafter, report.max_draft_tokens) == (True, "tiny", 3)
    assert (report.drafting, report.drafter_healthy, report.step_time_error) == (True, True, 0.0625)
    assert report.calibration_errors == {"drafter": 0.03125, "repetition": None}
    broken = SpeculationSnapshot(counted().counts, SpeculationState(False, False))
    report = SpeculationReport.of(speculation_source(broken))
    assert (report.drafting, report.drafter_healthy, report.step_time_error) == (False, False, None)


def test_the_last_minute_is_told_apart() -> None:
    now = time.monotonic()
    source = speculation_source(counted(), now=now - 61)
    later = counted()
    later.counts.undrafted_steps += 3
    source.history.record(now, later)
    report = SpeculationReport.of(source)
    assert (report.since_start.verify_steps, report.last_minute.verify_steps) == (19, 3)
    assert report.last_minute.draft_lengths == [3, 0, 0, 0]
    assert report.last_minute.sources["drafter"].acceptance_rate is None


def test_without_a_drafter_nothing_is_claimed() -> None:
    report = SpeculationReport.of(speculation_source(drafter=None))
    assert (report.enabled, report.drafter, report.max_draft_tokens) == (False, None, 0)
    assert (report.drafting, report.drafter_healthy) == (False, None)
    assert report.since_start.emitted_per_verify_step is None and report.since_start.acceptance_rate is None
    assert report.since_start.positions == [] and report.last_minute == report.since_start
