"""The picture of a benchmark: tokens per second by requests in flight, and beside them the ratio to plain decoding."""

from pathlib import Path

from bench.figures import colour, panels, save_figure
from bench.prompts import ALL_CATEGORIES
from bench.report import Report, Row

__all__ = ["draw_report"]

_STRONG = ("ar", "slipstream")


def draw_report(report: Report, path: Path) -> None:
    """Draw the rows of all categories together, with the spread over the repeats.

    Args:
        report: with at least one such row.
        path: file to write, whose name ends in ``.svg`` or ``.html``; it appears complete or not at all.

    Raises:
        BenchError: the file cannot be written.
    """
    figure, (left, right) = panels()
    for number, method in enumerate(report.methods):
        rows = [row for row in report.rows if (row.method, row.category) == (method.name, ALL_CATEGORIES)]
        color, linewidth = colour(2 * number), 2.4 if method.name in _STRONG else 1.1
        look = {"color": color, "linewidth": linewidth, "marker": ".", "capsize": 2.5, "elinewidth": 0.8}
        for axes, points in ((left, _speeds(rows)), (right, _ratios(rows))):
            if points:
                at, medians, least, most = zip(*points, strict=True)
                below = [median - low for median, low in zip(medians, least, strict=True)]
                above = [high - median for median, high in zip(medians, most, strict=True)]
                axes.errorbar(at, medians, (below, above), label=method.name if axes is left else None, **look)
    left.set(title="Tokens per second", yscale="log")
    right.set(title="Speed against plain decoding (ar)")
    right.axhline(1, color="black", linewidth=0.8, linestyle="--")
    settings = report.settings
    heading = (
        f"{Path(settings.model).name}, {report.machine.cpu}, {report.machine.cores} cores, "
        f"temperature {settings.temperature:g}, medians of {settings.repeats} repeats"
    )
    save_figure(figure, settings.concurrencies, heading, path, "Benchmark")


_Point = tuple[int, float, float, float]  # requests in flight; median, least and most


def _speeds(rows: list[Row]) -> list[_Point]:
    return [_point(row, row.tokens_per_second, row.tokens_per_second_spread) for row in rows]


def _ratios(rows: list[Row]) -> list[_Point]:
    return [
        _point(row, row.speed_vs_ar, row.speed_vs_ar_spread)
        for row in rows
        if row.speed_vs_ar is not None and row.speed_vs_ar_spread is not None
    ]


def _point(row: Row, median: float, spread: tuple[float, float]) -> _Point:
    return row.concurrency, median, *spread
