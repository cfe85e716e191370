from dataclasses import replace
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.plot import draw_report
from bench.report import MethodEntry, Report
from tests.bench.test_report import report


def measured() -> Report:
    """Two methods at two numbers of requests in flight, one of them never measured beside ``ar``."""
    rows = [row for row in report().rows if row.category == "all"]
    more = [replace(row, concurrency=4, tokens_per_second=30.0, tokens_per_second_spread=(28.0, 31.0)) for row in rows]
    alone = [replace(row, speed_vs_ar=None, speed_vs_ar_spread=None) for row in more]
    entries = tuple(MethodEntry(name, name, (name,), {}, 1.0) for name in ("ar", "slipstream"))
    return replace(report(), methods=entries, rows=(*rows, *alone))


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_the_picture_names_methods_machine_and_load(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot.{suffix}"
    draw_report(measured(), path)
    text = path.read_text()
    assert text.startswith("<?xml" if suffix == "svg" else "<!DOCTYPE html>")
    for shown in ("ar", "slipstream", "Tokens per second", "model, a CPU, 2 cores, temperature 0", ">4<"):
        assert shown in text
    draw_report(measured(), path)
    assert path.read_text() == text, "the same report gives the same file"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "plot.svg"
    with pytest.raises(BenchError, match=f"cannot write the plot {path}: No such file"):
        draw_report(measured(), path)
