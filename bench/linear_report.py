"""The report of ``slipstream bench-kernels --kernel linear``: a JSON file with a public schema, and the same as text.

The file holds one object, ``LinearReport``; every attribute is a key of the same name. It is written again after every
case, always whole. Times are in seconds, 1 GB is 10^9 bytes, 1 GF are 10^9 products and sums.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.kernel_report import CommonReport, Comparison, machine_line, operator_line
from bench.terminal import align_columns

__all__ = [
    "RATES_HEADER",
    "FormatTime",
    "LeftOutShape",
    "LibraryTime",
    "LinearReport",
    "LinearRow",
    "MissingLibrary",
    "Peak",
    "Rates",
    "WeightShape",
    "bounds_line",
    "milliseconds",
    "rate_cells",
    "render_linear_report",
]

SCHEMA_VERSION = 1
RATES_HEADER = ("GB/s", "of memory", "GF/s", "of peak")

_HEADER = (
    *("weight", "rows", "format", "operator, ms", "best library", "its ms", "faster by"),
    *RATES_HEADER,
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
class Rates:
    """How long something takes, and what it gets out of the machine.

    Attributes:
        seconds: median of its runs.
        weight_bytes: that one run has to read.
        gb_per_second: of these bytes.
        bandwidth_share: that, over what the memory gives in a plain sum with as many threads.
        gflops: products and sums, however many more widening the weights takes.
        peak_share: that, over the report's ``peak``.
    """

    seconds: float
    weight_bytes: int
    gb_per_second: float
    bandwidth_share: float
    gflops: float
    peak_share: float


@dataclass(frozen=True, slots=True)
class FormatTime(Rates):
    """The operator's product with the weight in one format.

    Attributes:
        best_library: beside the library with the smallest median.
        largest_difference: to PyTorch's product with the same numbers, over the largest result.
    """

    format: str
    best_library: Comparison
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
class LinearReport(CommonReport):
    """A whole report.

    Attributes:
        peak: of float32 arithmetic.
        rows, left_out: the cases.
        missing_libraries: what could not be measured beside the operator.
    """

    peak: Peak
    rows: tuple[LinearRow, ...]
    left_out: tuple[LeftOutShape, ...]
    missing_libraries: tuple[MissingLibrary, ...]
    kernel: str = "linear"
    schema_version: int = SCHEMA_VERSION


def render_linear_report(report: LinearReport) -> str:
    """The report as lines of text: what was measured, and the rows as a table with a line for each format."""
    return "\n".join(_lines(report))


def bounds_line(report: CommonReport, peak: Peak) -> str:
    """What a report was measured on, and what bounds products there."""
    arithmetic = f", {peak.gflops:.0f} GF/s in {peak.source}"
    return machine_line(report.machine, report.threads, report.memory_gb_per_second, arithmetic)


def milliseconds(seconds: float) -> str:
    """Cell of a time."""
    return f"{1000 * seconds:.3f}"


def rate_cells(rates: Rates) -> tuple[str, ...]:
    """Cells below ``RATES_HEADER``."""
    return (
        f"{rates.gb_per_second:.2f}",
        f"{rates.bandwidth_share:.0%}",
        f"{rates.gflops:.1f}",
        f"{rates.peak_share:.0%}",
    )


def _lines(report: LinearReport) -> Iterator[str]:
    yield bounds_line(report, report.peak)
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
        milliseconds(format.seconds),
        row.best_library,
        milliseconds(format.best_library.seconds),
        f"{format.best_library.speedup:.2f}x",
        *rate_cells(format),
    )
