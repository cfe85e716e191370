"""Writes the README's benchmark table from a report, so that the two cannot disagree.

Usage: ``python -m bench.readme docs/benchmarks/REPORT.json README.md``
"""

import os
import shlex
import sys
from itertools import pairwise
from pathlib import Path

from bench.errors import BenchError
from bench.report import MethodEntry, Report, Row, read_report

__all__ = ["benchmark_section", "update_readme"]

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


def benchmark_section(report: Report, source: str) -> str:
    """The Markdown between the markers.

    Args:
        report: what was measured.
        source: path of the report as the README links it.
    """
    settings = report.settings
    lines = [
        "## Measured",
        "",
        f"{report.machine.cpu}, {report.machine.cores} cores; {settings.dtype} weights, "
        f"temperature {settings.temperature:g}, answers of up to {settings.max_tokens} tokens, medians of "
        f"{settings.repeats} alternating repeats. `vllm` is unmodified vLLM, `ar` our engine with drafting off."
        + "".join(map(_explanation, report.methods)),
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
        *(_line(row) for row in report.rows if row.category == "all" or row.method == "slipstream"),
        "",
        f"Made by `{_command(report)}`; the whole report, with latencies, is [{source}]({source}).",
    ]
    return "\n".join(lines)


def update_readme(readme: str, section: str) -> str:
    """``readme`` with ``section`` between the markers.

    Raises:
        BenchError: the markers are missing.
    """
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise BenchError(f"the README lacks the markers {_BEGIN} and {_END}")
    return f"{before}{begin}\n{section}\n{end}{after}"


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
    """Rewrite the README in place; returns the exit code."""
    if len(arguments) != 2:
        print("usage: python -m bench.readme REPORT README", file=sys.stderr)
        return 2
    source, readme = Path(arguments[0]), Path(arguments[1])
    try:
        section = benchmark_section(read_report(source), os.path.relpath(source, readme.parent))
        text = update_readme(readme.read_text(encoding="utf-8"), section)
    except (BenchError, OSError) as error:
        print(f"bench.readme: error: {error}", file=sys.stderr)
        return 2
    unfinished = readme.with_suffix(".partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, readme)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
