"""What a person sees: plain lines where output goes to a file or a pipe, a table that fills in on a terminal."""

import sys
import time
from collections.abc import Sequence
from typing import IO, Protocol

from bench.methods import settings_text
from bench.plan import Cell
from bench.prompts import ALL_CATEGORIES
from bench.report import MethodEntry, Row

__all__ = ["Display", "PlainDisplay", "align_columns", "make_display", "render_settings", "render_table"]

_HEADER = (
    *("method", "at once", "category", "tokens/s", "vs vllm", "vs ar"),
    *("first token, ms", "per token, ms", "tokens/step", "same as ar"),
)
_NUMBERS_FROM = 3
"""Columns from here on are aligned to the right."""

_STATUS_SECONDS = 10.0


class Display(Protocol):
    """Where a benchmark reports its progress."""

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""

    def status(self, text: str) -> None:
        """Say what is going on just now; called often."""

    def measured(self, cell: Cell, done: int, total: int, left: float | None, rows: Sequence[Row]) -> None:
        """A cell is finished (or was given up).

        Args:
            cell: the cell.
            done, total: how many cells are finished, and of how many.
            left: estimated seconds until the end; ``None`` where unknown.
            rows: all rows so far.
        """

    def close(self) -> None:
        """Nothing more will come."""


class PlainDisplay:
    """One line an event; what merely goes on is said every ten seconds at most."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._spoke = time.monotonic()

    def note(self, text: str) -> None:
        """See ``Display``."""
        print(text, file=self._stream, flush=True)
        self._spoke = time.monotonic()

    def status(self, text: str) -> None:
        """See ``Display``."""
        if time.monotonic() - self._spoke >= _STATUS_SECONDS:
            self.note(text)

    def measured(self, cell: Cell, done: int, total: int, left: float | None, rows: Sequence[Row]) -> None:
        """See ``Display``."""
        self.note(f"{_progress(done, total, left)}  {_describe(cell, rows)}")

    def close(self) -> None:
        """See ``Display``."""


class LiveDisplay:
    """The table of everything measured so far, with one line below it that says what is going on.

    It is redrawn only when something happens: a thread that animates it would take time from the engines.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()
        self._rows: Sequence[Row] = ()
        self._progress = ""
        self._status = ""

    def note(self, text: str) -> None:
        """See ``Display``."""
        self._live.console.print(text, markup=False, highlight=False)
        self._draw()

    def status(self, text: str) -> None:
        """See ``Display``."""
        if text != self._status:
            self._status = text
            self._draw()

    def measured(self, cell: Cell, done: int, total: int, left: float | None, rows: Sequence[Row]) -> None:
        """See ``Display``."""
        self._rows, self._progress = rows, _progress(done, total, left)
        self._status = _describe(cell, rows)
        self._draw()

    def close(self) -> None:
        """See ``Display``."""
        self._live.stop()

    def _draw(self) -> None:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        rows = self._rows
        if len(rows) > self._console.size.height - 8:
            rows = [row for row in rows if row.category == ALL_CATEGORIES]
        table = Table(box=None, pad_edge=False)
        for column, title in enumerate(_HEADER):
            table.add_column(title, justify="right" if column >= _NUMBERS_FROM else "left", no_wrap=True)
        for row in rows:
            table.add_row(*_table_row(row))
        line = Text("  ".join(part for part in (self._progress, self._status) if part), overflow="ellipsis")
        self._live.update(Group(table, line) if rows else line, refresh=True)


def make_display(stream: IO[str] | None = None) -> Display:
    """The display that suits where the progress goes to: standard error by default."""
    stream = sys.stderr if stream is None else stream
    if stream is sys.stderr and stream.isatty():
        try:
            return LiveDisplay()
        except ImportError:  # rich comes with vLLM; without it plain lines do
            pass
    return PlainDisplay(stream)


def render_table(rows: Sequence[Row]) -> str:
    """The rows as aligned plain text, one line each below a header."""
    return align_columns([_HEADER, *(_table_row(row) for row in rows)], _NUMBERS_FROM)


def render_settings(methods: Sequence[MethodEntry]) -> str:
    """What the variants and the servers that are not ours are, a line each; empty without any."""
    details = ((method.name, settings_text(method.settings) or method.external) for method in methods)
    return "".join(f"{name}: {text}\n" for name, text in details if text)


def align_columns(lines: Sequence[Sequence[str]], numbers_from: int) -> str:
    """Lines of cells as plain text; columns from ``numbers_from`` on are aligned to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column >= numbers_from else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def duration(seconds: float) -> str:
    """A time span for people: ``40 s``, ``12 min``, ``1 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _progress(done: int, total: int, left: float | None) -> str:
    return f"[{done:>{len(str(total))}}/{total}" + (f", {duration(left)} left]" if left is not None else "]")


def _describe(cell: Cell, rows: Sequence[Row]) -> str:
    what = f"{cell.method}, {cell.category} at concurrency {cell.concurrency}"
    key = (cell.method, cell.category, cell.concurrency)
    row = next((row for row in rows if (row.method, row.category, row.concurrency) == key), None)
    return f"{what}: {_speed(row)} tokens/s" if row else what


def _table_row(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        str(row.concurrency),
        row.category,
        _speed(row),
        _ratio(row.speed_vs_vllm),
        _ratio(row.speed_vs_ar),
        _milliseconds(row.time_to_first_token_p50_seconds, row.time_to_first_token_p95_seconds),
        _milliseconds(row.time_per_output_token_p50_seconds, row.time_per_output_token_p95_seconds),
        "-" if row.emitted_per_verify_step is None else f"{row.emitted_per_verify_step:.2f}",
        _sameness(row),
    )


def _speed(row: Row) -> str:
    low, high = row.tokens_per_second_spread
    spread = f" ({low:.1f} to {high:.1f})" if row.repeats > 1 else ""
    return f"{row.tokens_per_second:.1f}{spread}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _milliseconds(p50: float | None, p95: float | None) -> str:
    return "-" if p50 is None or p95 is None else f"{1000 * p50:.0f}, p95 {1000 * p95:.0f}"


def _sameness(row: Row) -> str:
    if row.identical_fraction is None:
        return "-"
    # Rounded down, so that "100 %" is only said of all.
    return "all" if row.identical_to_ar else f"{int(1000 * row.identical_fraction) / 10:.1f} %"
