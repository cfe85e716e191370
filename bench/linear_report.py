"""The report of ``slipstream bench-kernels --kernel linear``: a JSON file with a public schema, and the same as text.

The file holds one object, ``LinearReport``; every attribute is a key of the same name. It is written again after every
case, always whole. Times are in seconds, 1 GB is 10^9 bytes, 1 GF are 10^9 products and sums.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.json_file import write_json
from bench.kernel_report import Comparison, machine_line, operator_line
from bench.machine import Machine
from bench.terminal import align_columns

__all__ = [
    "FormatTime",
    "LeftOutShape",
    "LibraryTime",
    "LinearReport",
    "LinearRow",
    "MissingLibrary",
    "Peak",
    "WeightShape",
    "render_linear_report",
    "write_linear_report",
]

SCHEMA_VERSION = 1

_HEADER = (
    *("weight", "rows", "format", "operator, ms", "best library", "its ms", "faster by"),
    *("GB/s", "of memory", "GF/s", "of peak"),
)


@dataclass(frozen=True, slots=True)
class WeightShape:
    """A weight's outputs and inputs."""

    out_features: int
    in_features: int

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}"

    @property
    def numbers(self) -> int:
        """Of the weight."""
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class Peak:
    """Products and sums a second, the most that was seen, and with what."""

    gflops: float
    source: str


@dataclass(frozen=True, slots=True)
class LibraryTime:
    """A library's product with the float32 weight.

    Attributes:
        seconds: median of its runs.
    """

    library: str
    seconds: float
    gflops: float


@dataclass(frozen=True, slots=True)
class FormatTime:
    """The operator's product with the weight in one format.

    Attributes:
        seconds: median of its runs.
        best_library: beside the library with the smallest median.
        weight_bytes: that one run has to read.
        gb_per_second: of these bytes.
        bandwidth_share: that, over what the memory gives in a plain sum with as many threads.
        gflops: products and sums, however many more widening the weight takes.
        peak_share: that, over the report's ``peak``.
        largest_difference: to PyTorch's product with the same numbers, over the largest result.
    """

    format: str
    seconds: float
    best_library: Comparison
    weight_bytes: int
    gb_per_second: float
    bandwidth_share: float
    gflops: float
    peak_share: float
    largest_difference: float


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One case: a weight and so many rows."""

    shape: WeightShape
    rows: int
    best_library: str
    libraries: tuple[LibraryTime, ...]
    formats: tuple[FormatTime, ...]


@dataclass(frozen=True, slots=True)
class MissingLibrary:
    """A library that was not measured, and why."""

    library: str
    reason: str


@dataclass(frozen=True, slots=True)
class LeftOutShape:
    """A weight that was not measured, and why."""

    shape: WeightShape
    reason: str


@dataclass(frozen=True, slots=True)
class LinearReport:
    """A whole report.

    Attributes:
        complete: all cases were measured or are among those left out.
        created: when the measurement was started, UTC, ISO 8601.
        command: the command line that made it.
        machine: what it was measured on.
        operator: what runs the operator on the CPU.
        operator_compiled: ``false`` where the operator is its PyTorch definition, which is not meant to be fast.
        threads: that torch was given.
        repeats: runs of each in each case.
        memory_gb_per_second: read by summing up a buffer that fits into no cache, best of several runs.
        peak: of float32 arithmetic.
        cache_bytes: of the outermost caches; ``null`` where unknown.
        rows, left_out: the cases.
        missing_libraries: what could not be measured beside the operator.
    """

    complete: bool
    created: str
    command: tuple[str, ...]
    machine: Machine
    operator: str
    operator_compiled: bool
    threads: int
    repeats: int
    memory_gb_per_second: float
    peak: Peak
    cache_bytes: int | None
    rows: tuple[LinearRow, ...]
    left_out: tuple[LeftOutShape, ...]
    missing_libraries: tuple[MissingLibrary, ...]
    kernel: str = "linear"
    schema_version: int = SCHEMA_VERSION


def write_linear_report(report: LinearReport, path: Path) -> None:
    """Write a report in one step; raises ``BenchError`` where that is not possible."""
    plain = asdict(report)
    first = {key: plain.pop(key) for key in ("schema_version", "kernel")}
    write_json({**first, **plain}, path)


def render_linear_report(report: LinearReport) -> str:
    """The report as lines of text: what was measured, and the rows as a table with a line for each format."""
    return "\n".join(_lines(report))


def _lines(report: LinearReport) -> Iterator[str]:
    arithmetic = f", {report.peak.gflops:.0f} GF/s in {report.peak.source}"
    yield machine_line(report.machine, report.threads, report.memory_gb_per_second, arithmetic)
    yield f"weights as outputs x inputs, read from memory; medians of {report.repeats}"
    yield operator_line(report.operator, report.operator_compiled)
    yield ""
    lines = [_cells(row, format) for row in report.rows for format in row.formats]
    yield align_columns([_HEADER, *lines], numbers_from=0)
    for missing in report.missing_libraries:
        yield f"not measured: {missing.library}: {missing.reason}"
    for case in report.left_out:
        yield f"left out: {case.shape}: {case.reason}"


def _cells(row: LinearRow, format: FormatTime) -> tuple[str, ...]:
    return (
        str(row.shape),
        str(row.rows),
        format.format,
        f"{1000 * format.seconds:.3f}",
        row.best_library,
        f"{1000 * format.best_library.seconds:.3f}",
        f"{format.best_library.speedup:.2f}x",
        f"{format.gb_per_second:.2f}",
        f"{format.bandwidth_share:.0%}",
        f"{format.gflops:.1f}",
        f"{format.peak_share:.0%}",
    )
