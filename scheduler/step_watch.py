"""How long the engine's steps take, and with what load; pure, no engine needed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from scheduler.cost import StepLoad


@dataclass(slots=True)
class _Step:
    load: StepLoad
    started: float
    seconds: float | None = None
    late_seconds: float = 0.0


class StepWatch:
    """Holds one step until everything about it is known: its load, its time, and what was drafted behind it.

    Args:
        clock: seconds of a monotonic clock.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._step: _Step | None = None

    def start(self, tokens: int, requests: int, context_tokens: int) -> None:
        """A step of ``tokens`` rows begins."""
        self._step = _Step(StepLoad(tokens, requests, context_tokens, 0, 0), self._clock())

    def stop(self) -> None:
        """It ends, drafting included."""
        if self._step is not None:
            self._step.seconds = self._clock() - self._step.started

    def drafted(self, lengths: Sequence[int], late_seconds: float = 0.0) -> None:
        """The drafts that were computed behind it; ``late_seconds`` of it are none of its own work."""
        if self._step is not None:
            self._step.late_seconds = late_seconds
            drafts = [length for length in lengths if length]
            self._step.load = replace(self._step.load, drafted_requests=len(drafts), drafted_slots=sum(drafts))

    def take(self) -> tuple[StepLoad, float] | None:
        """The step's load and the seconds of its own work, once; ``None`` if none has ended."""
        step, self._step = self._step, None
        if step is None or step.seconds is None or step.seconds <= step.late_seconds:
            return None
        return step.load, step.seconds - step.late_seconds
