import io
import sys
from dataclasses import replace

import pytest

from bench.plan import Cell
from bench.report import MethodEntry
from bench.terminal import LiveDisplay, PlainDisplay, duration, make_display, render_settings, render_table
from tests.bench.test_report import report

ROWS = report().rows
CELL = Cell(0, 1, "math", "ar")


def test_the_table_is_aligned_and_says_what_is_unknown() -> None:
    row = replace(ROWS[0], identical_to_ar=False, identical_fraction=0.9999, speed_vs_ar=None)
    header, first, second = render_table([row, ROWS[1]]).splitlines()
    assert header.split()[:5] == ["method", "at", "once", "category", "tokens/s"]
    assert "10.0 (10.0 to 10.0)" in first
    assert first.endswith("99.9 %")
    assert second.endswith("all")
    assert " -  " in first
    assert len(header) == max(len(header), len(first))


def test_variants_are_explained() -> None:
    assert render_settings(report().methods) == "short: a.b=1, c.d=x\n"
    assert render_settings(report().methods[:1]) == ""
    server = MethodEntry("other", "a server", (), {}, None, external="http://127.0.0.1:8081")
    assert render_settings([server]) == "other: http://127.0.0.1:8081\n"


def test_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    display = make_display(stream)
    assert isinstance(display, PlainDisplay)
    display.note("ar: ready")
    display.status("said too soon after the last line")
    display.measured(CELL, 3, 12, 75.0, ROWS)
    display.measured(CELL, 12, 12, None, ())
    display.close()
    assert stream.getvalue().splitlines() == [
        "ar: ready",
        "[ 3/12, 75 s left]  ar, math at concurrency 1: 10.0 (10.0 to 10.0) tokens/s",
        "[12/12]  ar, math at concurrency 1",
    ]


def test_the_live_table_fills_in(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "180")
    display = make_display()
    assert isinstance(display, LiveDisplay)
    display.note("[ar] ready")
    display.status("ar: warming up")
    display.measured(CELL, 3, 12, 600.0, ROWS)
    display.measured(CELL, 4, 12, 500.0, ROWS * 30)
    display.close()
    output = stream.getvalue()
    for text in ("[ar] ready", "ar: warming up", "slipstream", "10 min left"):
        assert text in output


@pytest.mark.parametrize(("seconds", "text"), [(40.2, "40 s"), (100, "2 min"), (3900, "1 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
