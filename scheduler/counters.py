"""Speculation counted for people: totals since start and over the last minute; pure, no engine needed."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.policy import Source


@dataclass(slots=True)
class SourceCounts:
    """Sums over the drafts of one source; a verify step is one decode step of one request.

    Attributes:
        drafted_tokens: proposed, whether they were verified or not.
        verified_lengths: ``[k]`` verify steps in which ``k`` of its draft tokens were verified; 0 stays empty.
        accepted_lengths: ``[k]`` of these steps that accepted ``k`` draft tokens.
        expected_tokens: draft tokens that were expected to be accepted when they were chosen.
        realised_tokens: draft tokens that were accepted in the steps of ``expected_tokens``. Steps that end an answer
            are in neither: what was accepted behind the end is not known.
    """

    drafted_tokens: int = 0
    verified_lengths: list[int] = field(default_factory=list)
    accepted_lengths: list[int] = field(default_factory=list)
    expected_tokens: float = 0.0
    realised_tokens: int = 0

    @property
    def verify_steps(self) -> int:
        return sum(self.verified_lengths)

    @property
    def verified_tokens(self) -> int:
        return _total(self.verified_lengths)

    @property
    def accepted_tokens(self) -> int:
        return _total(self.accepted_lengths)

    @property
    def emitted_tokens(self) -> int:
        """Every verify step emits the accepted tokens and one more."""
        return self.verify_steps + self.accepted_tokens

    @property
    def verified_by_position(self) -> list[int]:
        """``[k]`` times that draft position ``k`` was verified."""
        return _at_least(self.verified_lengths)

    @property
    def accepted_by_position(self) -> list[int]:
        """``[k]`` times that draft position ``k`` was accepted, and all before it."""
        return _at_least(self.accepted_lengths)

    def plus(self, other: "SourceCounts", sign: int = 1) -> "SourceCounts":
        """The sums of both; with ``sign`` -1, what is left without the other's."""
        return SourceCounts(
            self.drafted_tokens + sign * other.drafted_tokens,
            _added(self.verified_lengths, other.verified_lengths, sign),
            _added(self.accepted_lengths, other.accepted_lengths, sign),
            self.expected_tokens + sign * other.expected_tokens,
            self.realised_tokens + sign * other.realised_tokens,
        )


@dataclass(slots=True)
class SpeculationCounts:
    """Everything that only ever grows.

    Attributes:
        undrafted_steps: verify steps without a draft, which emit one token each.
        sources: indexed by ``Source``.
        steps: engine steps that were timed.
        measured_seconds: that they took.
        predicted_seconds: that the cost model expected them to take; 0 without a cost model.
    """

    undrafted_steps: int = 0
    sources: list[SourceCounts] = field(default_factory=lambda: [SourceCounts() for _ in Source])
    steps: int = 0
    measured_seconds: float = 0.0
    predicted_seconds: float = 0.0

    @classmethod
    def of_slots(cls, slots: int) -> "SpeculationCounts":
        """Nothing counted yet, with room for drafts of up to ``slots`` tokens."""
        lengths = [0] * (slots + 1)
        return cls(sources=[SourceCounts(0, lengths.copy(), lengths.copy()) for _ in Source])

    @property
    def drafts(self) -> SourceCounts:
        """The sums over all sources."""
        first, *others = self.sources
        for other in others:
            first = first.plus(other)
        return first

    @property
    def verify_steps(self) -> int:
        return self.undrafted_steps + self.drafts.verify_steps

    @property
    def emitted_tokens(self) -> int:
        return self.undrafted_steps + self.drafts.emitted_tokens

    @property
    def steps_by_length(self) -> list[int]:
        """``[k]`` verify steps in which ``k`` draft tokens were verified, from 0 on."""
        return _added([self.undrafted_steps], self.drafts.verified_lengths)

    def since(self, earlier: "SpeculationCounts") -> "SpeculationCounts":
        """What was counted after ``earlier``, an older state of these counts."""
        return SpeculationCounts(
            self.undrafted_steps - earlier.undrafted_steps,
            [now.plus(then, -1) for now, then in zip(self.sources, earlier.sources, strict=True)],
            self.steps - earlier.steps,
            self.measured_seconds - earlier.measured_seconds,
            self.predicted_seconds - earlier.predicted_seconds,
        )

    def copy(self) -> "SpeculationCounts":
        """An independent copy."""
        return self.since(SpeculationCounts())


@dataclass(slots=True)
class SpeculationState:
    """What holds at the moment.

    Attributes:
        drafting: drafts are computed behind the steps; not while they do not pay, nor without a drafter.
        drafter_healthy: the drafter does its work.
        step_time_error: median relative error of the latest predictions of step times; ``None`` before the first.
        calibration_errors: indexed by ``Source``, mean distance of predicted from observed acceptance, 0 to 1;
            ``None`` where nothing is known.
    """

    drafting: bool = False
    drafter_healthy: bool = True
    step_time_error: float | None = None
    calibration_errors: list[float | None] = field(default_factory=lambda: [None for _ in Source])


@dataclass(slots=True)
class SpeculationSnapshot:
    """All that the scheduler's process tells the front end, cumulative: losing one loses nothing."""

    counts: SpeculationCounts = field(default_factory=SpeculationCounts)
    state: SpeculationState = field(default_factory=SpeculationState)


class SpeculationHistory:
    """The latest snapshot, and one a second of the last minute.

    Args:
        window: seconds that ``recent`` looks back.
    """

    def __init__(self, window: float = 60.0):
        self.latest = SpeculationSnapshot()
        self._window = window
        self._earlier: deque[tuple[float, SpeculationCounts]] = deque()

    def record(self, now: float, snapshot: SpeculationSnapshot) -> None:
        """Take over a snapshot, which nobody changes from now on, at time ``now`` (seconds of a monotonic clock)."""
        if not self._earlier or now - self._earlier[-1][0] >= 1.0:
            self._earlier.append((now, self.latest.counts))
        self._forget(now)
        self.latest = snapshot

    def recent(self, now: float) -> SpeculationCounts:
        """What was counted in the last ``window`` seconds, to the second."""
        self._forget(now)
        return self.latest.counts.since(self._earlier[0][1]) if self._earlier else SpeculationCounts()

    def _forget(self, now: float) -> None:
        while self._earlier and now - self._earlier[0][0] > self._window:
            self._earlier.popleft()


def _total(lengths: Sequence[int]) -> int:
    return sum(length * count for length, count in enumerate(lengths))


def _at_least(lengths: Sequence[int]) -> list[int]:
    """``[k]`` entries longer than ``k``."""
    return [sum(lengths[k:]) for k in range(1, len(lengths))]


def _added(left: Sequence[int], right: Sequence[int], sign: int = 1) -> list[int]:
    size = max(len(left), len(right))
    padded = zip([*left, *[0] * (size - len(left))], [*right, *[0] * (size - len(right))], strict=True)
    return [a + sign * b for a, b in padded]
