"""Speculation counted for people: totals since start and over the last minute; pure, no engine needed."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class SpeculationTotals:
    """Sums over verify steps; a verify step is one decode step of one request.

    ``verified_by_position[k]`` and ``accepted_by_position[k]`` count draft slot ``k``. Every verify step emits the
    accepted tokens and one more, so ``emitted_tokens`` needs no counter of its own.
    """

    verify_steps: int = 0
    drafted_tokens: int = 0
    verified_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)

    @property
    def verified_tokens(self) -> int:
        return sum(self.verified_by_position)

    @property
    def accepted_tokens(self) -> int:
        return sum(self.accepted_by_position)

    @property
    def emitted_tokens(self) -> int:
        return self.verify_steps + self.accepted_tokens

    def add(self, verify_steps: int, verified: Sequence[int], accepted: Sequence[int]) -> None:
        """Count verify steps with what they verified and accepted per position."""
        self.verify_steps += verify_steps
        self.verified_by_position = _added(self.verified_by_position, verified)
        self.accepted_by_position = _added(self.accepted_by_position, accepted)

    def since(self, earlier: "SpeculationTotals") -> "SpeculationTotals":
        """What was counted after ``earlier``, an older copy of these totals."""
        return SpeculationTotals(
            self.verify_steps - earlier.verify_steps,
            self.drafted_tokens - earlier.drafted_tokens,
            _added(self.verified_by_position, [-n for n in earlier.verified_by_position]),
            _added(self.accepted_by_position, [-n for n in earlier.accepted_by_position]),
        )

    def copy(self) -> "SpeculationTotals":
        """An independent copy."""
        return self.since(SpeculationTotals())


class SpeculationHistory:
    """Totals since start with one copy a second, so that the last minute can be told.

    Args:
        window: seconds that ``recent`` looks back.
    """

    def __init__(self, window: float = 60.0):
        self.totals = SpeculationTotals()
        self._window = window
        self._copies: deque[tuple[float, SpeculationTotals]] = deque()

    def add(self, now: float, verify_steps: int, verified: Sequence[int], accepted: Sequence[int]) -> None:
        """Count verify steps at time ``now`` (seconds of any monotonic clock)."""
        self._remember(now)
        self.totals.add(verify_steps, verified, accepted)

    def set_drafted(self, now: float, drafted_tokens: int) -> None:
        """Take over the drafter's own count, which it keeps since start."""
        self._remember(now)
        self.totals.drafted_tokens = drafted_tokens

    def recent(self, now: float) -> SpeculationTotals:
        """What was counted in the last ``window`` seconds, to the second."""
        self._forget(now)
        return self.totals.since(self._copies[0][1]) if self._copies else SpeculationTotals()

    def _remember(self, now: float) -> None:
        """Keep the totals as they were before what is about to be added."""
        if not self._copies or now - self._copies[-1][0] >= 1.0:
            self._copies.append((now, self.totals.copy()))
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._copies and now - self._copies[0][0] > self._window:
            self._copies.popleft()


def _added(left: Sequence[int], right: Sequence[int]) -> list[int]:
    size = max(len(left), len(right))
    return [(left[i] if i < len(left) else 0) + (right[i] if i < len(right) else 0) for i in range(size)]
