"""Some speculation that was counted, for tests of those who tell it."""

from scheduler.counters import (
    SourceCounts,
    SpeculationCounts,
    SpeculationHistory,
    SpeculationSnapshot,
    SpeculationState,
)
from server.speculation_report import SpeculationSource


def counted() -> SpeculationSnapshot:
    """Sixteen verify steps: two without a draft, ten with the drafter's, four with repetitions."""
    drafter = SourceCounts(40, [0, 2, 4, 4], [4, 3, 2, 1], expected_tokens=9.5, realised_tokens=8)
    repetition = SourceCounts(6, [0, 3, 0, 1], [1, 2, 0, 1], expected_tokens=4.25, realised_tokens=5)
    counts = SpeculationCounts(2, [drafter, repetition], steps=12, measured_seconds=1.5, predicted_seconds=1.25)
    return SpeculationSnapshot(counts, SpeculationState(True, True, 0.0625, [0.03125, None]))


def speculation_source(
    snapshot: SpeculationSnapshot | None = None, drafter: str | None = "tiny", slots: int = 3, now: float = 0.0
) -> SpeculationSource:
    """A source that tells ``snapshot``, recorded at ``now``."""
    history = SpeculationHistory()
    if snapshot is not None:
        history.record(now, snapshot)
    return SpeculationSource(drafter, slots if drafter else 0, history)
