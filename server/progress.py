"""A progress bar for the terminal, and lines now and then where the output is not one."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TextIO

_WIDTH = 24
_REDRAW_SECONDS = 0.1
_LINE_STEP = 0.1  # without a terminal: a line for every tenth of the work


class Progress(Protocol):
    """Told how far a piece of work is: a fraction from 0 to 1, and what is being done."""

    def __call__(self, fraction: float, stage: str) -> None:
        """Take note; called often, so it must be cheap."""
        ...


def silent(fraction: float, stage: str) -> None:
    """A ``Progress`` that shows nothing."""


def part(progress: Progress, start: float, end: float) -> Progress:
    """A ``Progress`` for a stage that is the stretch from ``start`` to ``end`` of the whole."""
    return lambda fraction, stage: progress(start + (end - start) * fraction, stage)


class ProgressBar:
    """One bar with percentage, stage and time left; a context manager and a ``Progress``."""

    def __init__(self, label: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._label = label
        self._stream = stream or sys.stderr
        self._clock = clock
        self._started = clock()
        self._first_fraction = 0.0
        self._shown_at = float("-inf")
        self._shown_fraction = -1.0
        self._open = False

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._stream.write("\n")
            self._stream.flush()

    def __call__(self, fraction: float, stage: str) -> None:
        """Show that ``fraction`` (0 to 1) of the work is done and ``stage`` is under way."""
        fraction = min(max(fraction, self._shown_fraction, 0.0), 1.0)
        now = self._clock()
        if self._shown_fraction < 0:
            self._started, self._first_fraction = now, fraction  # work that was resumed has no speed yet
        text = f"{self._label}: {fraction:4.0%} {stage}{self._time_left(fraction, now)}"
        if self._stream.isatty():
            if now - self._shown_at < _REDRAW_SECONDS and fraction < 1:
                return
            filled = round(_WIDTH * fraction)
            self._stream.write(f"\r\x1b[K[{'#' * filled}{'.' * (_WIDTH - filled)}] {text}")
            self._open = True
        elif fraction - self._shown_fraction >= _LINE_STEP or (fraction == 1 and self._shown_fraction < 1):
            self._stream.write(f"{text}\n")
        else:
            return
        self._stream.flush()
        self._shown_at, self._shown_fraction = now, fraction

    def _time_left(self, fraction: float, now: float) -> str:
        elapsed, done = now - self._started, fraction - self._first_fraction
        if done < 0.02 or fraction == 1 or elapsed < 1:
            return ""
        left = round(elapsed * (1 - fraction) / done)
        return f", {left // 60}:{left % 60:02d} left"
