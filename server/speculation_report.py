"""What ``GET /v1/speculation`` answers."""

import time
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from scheduler.counters import SourceCounts, SpeculationCounts, SpeculationHistory
from scheduler.policy import Source


@dataclass(frozen=True, slots=True)
class SpeculationSource:
    """Where the application reads speculation from.

    Attributes:
        drafter: name of the drafter, ``None`` when drafting is off.
        max_draft_tokens: longest draft, 0 when drafting is off.
        history: counts fed by the engine's statistics.
    """

    drafter: str | None
    max_draft_tokens: int
    history: SpeculationHistory


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True)


class PositionReport(_Report):
    """One draft slot: how often it was verified and accepted."""

    position: int
    verified: int
    accepted: int
    acceptance_rate: float | None


class SourceReport(_Report):
    """What became of the drafts of one source."""

    verify_steps: int
    drafted_tokens: int
    verified_tokens: int
    accepted_tokens: int
    emitted_tokens: int
    acceptance_rate: float | None
    expected_accepted_tokens: float
    realised_accepted_tokens: int
    positions: list[PositionReport]

    @classmethod
    def of(cls, counts: SourceCounts) -> "SourceReport":
        """The report of ``counts``."""
        return cls(
            verify_steps=counts.verify_steps,
            drafted_tokens=counts.drafted_tokens,
            verified_tokens=counts.verified_tokens,
            accepted_tokens=counts.accepted_tokens,
            emitted_tokens=counts.emitted_tokens,
            acceptance_rate=_ratio(counts.accepted_tokens, counts.verified_tokens),
            expected_accepted_tokens=round(counts.expected_tokens, 2),
            realised_accepted_tokens=counts.realised_tokens,
            positions=_positions(counts),
        )


class TotalsReport(_Report):
    """Counts over some time; rates are null while there is nothing to divide by.

    A verify step is one decode step of one request, whether drafts were verified in it or not; a step is one of the
    engine. ``draft_lengths[k]`` counts the verify steps in which ``k`` draft tokens were verified.
    """

    verify_steps: int
    drafted_tokens: int
    verified_tokens: int
    accepted_tokens: int
    emitted_tokens: int
    emitted_per_verify_step: float | None
    acceptance_rate: float | None
    expected_accepted_tokens: float
    realised_accepted_tokens: int
    positions: list[PositionReport]
    draft_lengths: list[int]
    sources: dict[str, SourceReport]
    steps: int
    measured_step_seconds: float
    predicted_step_seconds: float

    @classmethod
    def of(cls, counts: SpeculationCounts) -> "TotalsReport":
        """The report of ``counts``."""
        drafts = counts.drafts
        return cls(
            verify_steps=counts.verify_steps,
            drafted_tokens=drafts.drafted_tokens,
            verified_tokens=drafts.verified_tokens,
            accepted_tokens=drafts.accepted_tokens,
            emitted_tokens=counts.emitted_tokens,
            emitted_per_verify_step=_ratio(counts.emitted_tokens, counts.verify_steps),
            acceptance_rate=_ratio(drafts.accepted_tokens, drafts.verified_tokens),
            expected_accepted_tokens=round(drafts.expected_tokens, 2),
            realised_accepted_tokens=drafts.realised_tokens,
            positions=_positions(drafts),
            draft_lengths=counts.steps_by_length,
            sources={source.name.lower(): SourceReport.of(counts.sources[source]) for source in Source},
            steps=counts.steps,
            measured_step_seconds=round(counts.measured_seconds, 4),
            predicted_step_seconds=round(counts.predicted_seconds, 4),
        )


class SpeculationReport(_Report):
    """Answer of ``GET /v1/speculation``.

    ``enabled`` says whether the server has a drafter, ``drafting`` whether it drafts at present: not while that does
    not pay. Errors are null before they are known.
    """

    enabled: bool
    drafter: str | None
    max_draft_tokens: int
    drafting: bool
    drafter_healthy: bool | None
    step_time_error: float | None
    calibration_errors: dict[str, float | None]
    since_start: TotalsReport
    last_minute: TotalsReport

    @classmethod
    def of(cls, speculation: SpeculationSource) -> "SpeculationReport":
        """The report of now."""
        history = speculation.history
        state, enabled = history.latest.state, speculation.drafter is not None
        return cls(
            enabled=enabled,
            drafter=speculation.drafter,
            max_draft_tokens=speculation.max_draft_tokens,
            drafting=state.drafting,
            drafter_healthy=state.drafter_healthy if enabled else None,
            step_time_error=state.step_time_error,
            calibration_errors={source.name.lower(): state.calibration_errors[source] for source in Source},
            since_start=TotalsReport.of(history.latest.counts),
            last_minute=TotalsReport.of(history.recent(time.monotonic())),
        )


def _positions(counts: SourceCounts) -> list[PositionReport]:
    pairs = zip(counts.verified_by_position, counts.accepted_by_position, strict=True)
    return [
        PositionReport(position=i, verified=v, accepted=a, acceptance_rate=_ratio(a, v))
        for i, (v, a) in enumerate(pairs)
    ]


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
