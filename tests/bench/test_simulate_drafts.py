from dataclasses import replace

import numpy as np
import pytest

from bench.errors import BenchError
from bench.simulate_drafts import calibrate, drafts_of, truncate
from scheduler.recording import SOURCES
from scheduler.trace import DraftRecord, Trace, TraceHeader
from tests.bench.synthetic_drafts import synthetic_drafts, synthetic_trace

HEADER = TraceHeader(3, SOURCES, "target", "drafter", "fixed:3")


def trace(*drafts: DraftRecord) -> Trace:
    return Trace(HEADER, list(drafts))


def test_drafts_are_grouped_by_request_and_trace() -> None:
    first = trace(
        DraftRecord("a", 0, 10, ((0.9, 0.5), ()), 0, 2, 1),
        DraftRecord("b", 0, 20, ((0.8,), ()), 0, 1, 0),
        DraftRecord("a", 1, 12, ((0.7, 0.1, 0.1), (0.9, 0.9)), 1, 2, 2),
    )
    second = trace(DraftRecord("a", 0, 30, ((0.6,), ()), 0, 1, 1))
    drafts = drafts_of([("one", first), ("two", second)])
    assert drafts.slots == 3
    assert drafts.firsts.tolist() == [0, 2, 3] and drafts.counts.tolist() == [2, 1, 1]
    assert drafts.prompts.tolist() == [10, 20, 30]
    assert drafts.lengths.tolist() == [2 + 3, 1, 2]
    assert drafts.survival.tolist() == [[0.9, 0.5, 0], [0.9, 0.9, 0], [0.8, 0, 0], [0.6, 0, 0]]
    assert drafts.offered.tolist() == [2, 2, 1, 1]
    assert drafts.sources.tolist() == [0, 1, 0, 0]
    assert drafts.outcomes.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_traces_without_drafts_or_of_other_sources_are_mistakes() -> None:
    nothing = trace(DraftRecord("a", 0, 10, ((), (0.5,)), 0, 0, 0))
    with pytest.raises(BenchError, match="one, two: no drafts, nothing can be replayed"):
        drafts_of([("one", nothing), ("two", trace())])
    other = Trace(replace(HEADER, sources=("ngram",)), [])
    with pytest.raises(BenchError, match=r"one: its sources are \['ngram'\], expected \['drafter', 'repetition'\]"):
        drafts_of([("one", other)])


def test_calibrated_probabilities_are_close_to_the_true_ones() -> None:
    truth = synthetic_drafts(requests=100, drafts=100, slots=4, right=0.7)
    estimated = calibrate(truth).acceptance
    # The drafter claims more than is true; what differs between requests is not in the confidence alone.
    assert np.abs(truth.survival - truth.acceptance).mean() > 0.07
    assert np.abs(estimated - truth.acceptance).mean() < 0.03
    assert np.abs((estimated - truth.acceptance).mean(axis=0)).max() < 0.01
    assert (np.diff(estimated, axis=1) <= 0).all()


def test_sources_are_calibrated_apart() -> None:
    draft = DraftRecord("a", 0, 10, ((0.5,), (0.5,)), 0, 1, 0)
    drafts = drafts_of([("one", trace(*[draft] * 98, *[replace(draft, source=1, accepted=1)] * 98))])
    assert drafts.acceptance[:98, 0].tolist() == [0.01] * 98
    assert drafts.acceptance[98:, 0].tolist() == [0.99] * 98


def test_calibration_knows_nothing_of_what_was_never_reached_or_offered() -> None:
    drafts = drafts_of([("one", trace(*[DraftRecord("a", 0, 10, ((0.9, 0.8), ()), 0, 2, 0)] * 8))])
    assert drafts.acceptance.tolist() == [[0.1, 0.05, 0.0]] * 8


def test_a_truncated_trace_has_known_outcomes_that_lengths_do_not_tell() -> None:
    survival = ((0.9, 0.5, 0.4), (0.1, 0.1))
    cut = truncate(
        trace(
            DraftRecord("a", 0, 10, survival, 0, 2, 2),
            DraftRecord("a", 0, 13, survival, 0, 2, 1),
            DraftRecord("a", 0, 15, survival, 0, 0, 0),
        )
    )
    assert cut.censored == 0
    assert [draft.survival for draft in cut.drafts] == [((0.9, 0.5), (0.1, 0.1))] * 2


def test_the_synthetic_drafter_accepts_as_often_as_it_says_it_does() -> None:
    recorded, truth = synthetic_trace(requests=50, drafts=200, slots=3, right=0.6)
    accepted = np.array([draft.accepted for draft in recorded.drafts])
    for slot in range(3):
        assert (accepted > slot).mean() == pytest.approx(truth[:, slot].mean(), abs=0.015)
