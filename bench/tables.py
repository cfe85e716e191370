"""Writes the tables of a report into a document, so that the two cannot disagree.

Usage: ``python -m bench.tables docs/benchmarks/REPORT.json DOCUMENT.md``

The document says by its markers what it wants: a table of speeds by requests in flight between
``<!-- speeds:begin REPORT.json -->`` and ``<!-- speeds:end -->``, otherwise, as in the README, the whole section of
measurements.
"""

import os
import shlex
import sys
from itertools import pairwise
from pathlib import Path

from bench.errors import BenchError
from bench.prompts import ALL_CATEGORIES
from bench.report import MethodEntry, Report, Row, Settings, read_report

__all__ = ["benchmark_section", "speeds_section", "update_document"]

_COLUMNS = (
    "concurrency",
    "prompts",
    "method",
    "tokens/s",
    "vs `vllm`",
    "vs `ar`",
    "emitted per verify step",
    "same text as `ar`",
)
_BEGIN, _END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
_SPEEDS_BEGIN, _SPEEDS_END = "<!-- speeds:begin {} -->", "<!-- speeds:end -->"


def benchmark_section(report: Report, source: str) -> str:
    """The Markdown between the markers.

    Args:
        report: what was measured.
        source: path of the report as the README links it.
    """
    settings = report.settings
    categories = settings.prompts_per_category
    shown = {"slipstream": (*categories, ALL_CATEGORIES)} if len(categories) > 1 else {}
    lines = [
        "## Measured",
        "",
        f"{report.machine.cpu}, {report.machine.cores} cores; {settings.dtype} weights, "
        f"temperature {settings.temperature:g}, answers of up to {_limits(settings)} tokens, medians of "
        f"{settings.repeats} alternating repeats. `vllm` is unmodified vLLM, `ar` our engine with drafting off."
        + "".join(map(_explanation, report.methods)),
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
        *(_line(row) for row in report.rows if row.category in shown.get(row.method, (ALL_CATEGORIES,))),
        "",
        f"Made by `{_command(report)}`; the whole report, with latencies, is [{source}]({source}).",
    ]
    return "\n".join(lines)


def speeds_section(report: Report, source: str) -> str:
    """A table of tokens per second, and in brackets against ``ar``, of methods by requests in flight.

    Args:
        report: what was measured.
        source: path of the report as the document links it.
    """
    rows = {(row.method, row.concurrency): row for row in report.rows if row.category == ALL_CATEGORIES}
    concurrencies = report.settings.concurrencies
    lines = [
        f"| temperature {report.settings.temperature:g}, requests at once | {' | '.join(map(str, concurrencies))} |",
        "|---" * (len(concurrencies) + 1) + "|",
    ]
    for method in report.methods:
        cells = [_speed(rows.get((method.name, concurrency))) for concurrency in concurrencies]
        lines.append(f"| {_cell(method.name)} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Medians of {report.settings.repeats} alternating repeats on {report.machine.cpu}, "
        f"{report.machine.cores} cores; [{source}]({source}), made by `{_command(report)}`.",
    ]
    return "\n".join(lines)


def update_document(text: str, report: Report, report_name: str, source: str) -> str:
    """``text`` with what it wants of a report between its markers.

    Args:
        text: the document.
        report: what was measured.
        report_name: of the report's file, by which markers ask for it.
        source: its path as the document links it.

    Raises:
        BenchError: the markers are missing.
    """
    speeds_begin = _SPEEDS_BEGIN.format(report_name)
    if speeds_begin in text:
        return _between(text, speeds_begin, _SPEEDS_END, speeds_section(report, source))
    return _between(text, _BEGIN, _END, benchmark_section(report, source))


def _between(text: str, begin: str, end: str, section: str) -> str:
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise BenchError(f"the document lacks the markers {begin} and {end}")
    return f"{before}{begin}\n{section}\n{end}{after}"


def _speed(row: Row | None) -> str:
    if row is None:
        return ""
    ratio = "" if row.speed_vs_ar is None else f" ({row.speed_vs_ar:.2f})"
    return f"{row.tokens_per_second:.1f}{ratio}"


def _explanation(method: MethodEntry) -> str:
    """What a method is that only this report has, as a sentence."""
    if method.external:
        return f" `{method.name}` is another server, with weights and arithmetic of its own: `{method.external}`."
    return f" `{method.name}` is {method.summary}." if method.settings else ""


def _line(row: Row) -> str:
    cells = [
        str(row.concurrency),
        row.category,
        _cell(row.method),
        _number(row.tokens_per_second, 1),
        _number(row.speed_vs_vllm, 2),
        _number(row.speed_vs_ar, 2),
        _number(row.emitted_per_verify_step, 2),
        "" if row.identical_fraction is None else f"{row.identical_fraction:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def _limits(settings: Settings) -> str:
    if settings.shortest is None:
        return f"{settings.max_tokens}"
    return f"{settings.shortest} to {settings.max_tokens}"


def _cell(text: str) -> str:
    """Text that a person chose, as a cell of a table."""
    return text.replace("|", "\\|")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _command(report: Report) -> str:
    words = []
    for flag, word in pairwise(("", *report.command)):
        # Addresses only look like paths, and the command lines of servers are recorded without folders.
        is_server = flag == "--server" or word.startswith("--server=")
        words.append(Path(word).name if os.sep in word and not is_server else word)
    return shlex.join(words)


def main(arguments: list[str]) -> int:
    """Rewrite the document in place; returns the exit code."""
    if len(arguments) != 2:
        print("usage: python -m bench.tables REPORT DOCUMENT", file=sys.stderr)
        return 2
    source, document = Path(arguments[0]), Path(arguments[1])
    try:
        link = os.path.relpath(source, document.parent)
        text = update_document(document.read_text(encoding="utf-8"), read_report(source), source.name, link)
    except (BenchError, OSError) as error:
        print(f"bench.tables: error: {error}", file=sys.stderr)
        return 2
    unfinished = document.with_suffix(".partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, document)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
