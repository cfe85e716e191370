"""The report of ``slipstream bench-kernels``: a JSON file with a public schema, and the same as text.

The file holds one object, ``KernelReport``; every attribute is a key of the same name. It is written again after every
case, always whole. Times are in seconds, 1 GB is 10^9 bytes. What the other kernels' reports share with it is
``CommonReport``.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.json_file import write_json
from bench.machine import Machine
from bench.terminal import align_columns

__all__ = [
    "CommonReport",
    "Comparison",
    "KernelReport",
    "KernelRow",
    "KernelShape",
    "LeftOut",
    "machine_line",
    "operator_line",
    "render_report",
    "write_report",
]

SCHEMA_VERSION = 1

_HEADER = (
    *("context", "requests", "operator, ms", "gather + SDPA, ms", "faster by", "kept buffers, ms", "faster by"),
    *("K/V read, MB", "GB/s", "of memory"),
)


@dataclass(frozen=True, slots=True)
class KernelShape:
    """What all cases share: attention of ``slots`` draft slots with ``heads`` heads of ``head_dim`` numbers of format
    ``dtype``, of which groups share ``kv_heads`` keys and values, over pages of ``page_size`` tokens.
    """

    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    page_size: int
    dtype: str

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)

    def pages(self, context: int) -> int:
        """Pages that a context of this many tokens fills."""
        return -(-context // self.page_size)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Something else beside the operator.

    Attributes:
        seconds: median of its runs.
        speedup, speedup_spread: median of the ratios of neighbouring runs, above 1 where the operator is faster;
            smallest and largest.
    """

    seconds: float
    speedup: float
    speedup_spread: tuple[float, float]


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One case.

    Attributes:
        context, requests: tokens before each block, and requests in the batch.
        operator_seconds: median of the operator's runs.
        sdpa: gathering the pages and ``torch.nn.functional.scaled_dot_product_attention`` over what was gathered, as
            one would write it.
        buffered_sdpa: the same with everything that can be done without a kernel: buffers that are kept from call to
            call, and no repeated keys.
        kv_bytes: keys and values that one run has to read, of context and blocks.
        gb_per_second: what the operator reads.
        bandwidth_share: that, over what the memory gives in a plain sum with as many threads.
        largest_difference: between the operator's result and the others'.
    """

    context: int
    requests: int
    operator_seconds: float
    sdpa: Comparison
    buffered_sdpa: Comparison
    kv_bytes: int
    gb_per_second: float
    bandwidth_share: float
    largest_difference: float


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A case that was not measured, and why."""

    context: int
    requests: int
    reason: str


@dataclass(frozen=True, slots=True)
class CommonReport:
    """What the reports of all kernels say.

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
        cache_bytes: of the outermost caches; ``null`` where unknown.
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
    cache_bytes: int | None


@dataclass(frozen=True, slots=True)
class KernelReport(CommonReport):
    """The report of the attention operator.

    Attributes:
        shape: what all cases share.
        rows, left_out: the cases.
    """

    shape: KernelShape
    rows: tuple[KernelRow, ...]
    left_out: tuple[LeftOut, ...]
    schema_version: int = SCHEMA_VERSION


def write_report(report: CommonReport, path: Path) -> None:
    """Write a kernel's report in one step; raises ``BenchError`` where that is not possible."""
    plain = asdict(report)
    first = [key for key in ("schema_version", "kernel") if key in plain]
    write_json({key: plain[key] for key in dict.fromkeys([*first, *plain])}, path)


def render_report(report: KernelReport) -> str:
    """The report as lines of text: what was measured, and the rows as a table."""
    return "\n".join(_lines(report))


def machine_line(machine: Machine, threads: int, memory_gb_per_second: float, arithmetic: str = "") -> str:
    """What a report was measured on; ``arithmetic`` says what else bounds it."""
    load = "" if machine.load_average is None else f", load average before {machine.load_average:g}"
    counted = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{machine.cpu}, {counted}, memory read at {memory_gb_per_second:.1f} GB/s{arithmetic}{load}"


def operator_line(operator: str, compiled: bool) -> str:
    """What ran the operator, or that nothing compiled did."""
    if compiled:
        return f"operator: {operator}"
    return f"The operator is not compiled ({operator}): its times are those of its definition in PyTorch."


def _lines(report: KernelReport) -> Iterator[str]:
    shape = report.shape
    yield machine_line(report.machine, report.threads, report.memory_gb_per_second)
    yield (
        f"{shape.slots} slots, {shape.heads} heads, {shape.kv_heads} key heads, head_dim {shape.head_dim}, "
        f"{shape.dtype}, pages of {shape.page_size} tokens; medians of {report.repeats}"
    )
    yield operator_line(report.operator, report.operator_compiled)
    yield ""
    yield align_columns([_HEADER, *map(_cells, report.rows)], numbers_from=0)
    for case in report.left_out:
        yield f"left out: context {case.context}, {_requests(case.requests)}: {case.reason}"


def _cells(row: KernelRow) -> tuple[str, ...]:
    return (
        str(row.context),
        str(row.requests),
        f"{1000 * row.operator_seconds:.3f}",
        f"{1000 * row.sdpa.seconds:.3f}",
        f"{row.sdpa.speedup:.2f}x",
        f"{1000 * row.buffered_sdpa.seconds:.3f}",
        f"{row.buffered_sdpa.speedup:.2f}x",
        f"{row.kv_bytes / 1e6:.2f}",
        f"{row.gb_per_second:.2f}",
        f"{row.bandwidth_share:.0%}",
    )


def _requests(count: int) -> str:
    return f"{count} request{'s' if count > 1 else ''}"
