"""The report of ``slipstream bench-kernels --kernel layer``: a JSON file with a public schema, and the same as text.

The file holds one object, ``LayerReport``; every attribute is a key of the same name. It is written again after every
round, always whole. Times are in seconds, 1 GB is 10^9 bytes, 1 GF are 10^9 products and sums.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.kernel_report import CommonReport, Comparison, operator_line
from bench.layer_shape import LayerShape
from bench.linear_report import RATES_HEADER, MissingLibrary, Peak, Rates, bounds_line, milliseconds, rate_cells
from bench.terminal import align_columns

__all__ = ["LayerReport", "LayerRow", "LeftOutWeights", "PartTime", "render_layer_report"]

SCHEMA_VERSION = 1

_HEADER = (
    *("weights", "tokens", "layers, ms", "head, ms", "step, ms", "steps of 1", *RATES_HEADER),
    *("baseline, ms", "faster by"),
)


@dataclass(frozen=True, slots=True)
class PartTime(Rates):
    """A part of a step.

    Attributes:
        steps_of_one, steps_of_one_spread: median of the ratios to the same part of a step of one token in the same
            round; smallest and largest.
    """

    steps_of_one: float
    steps_of_one_spread: tuple[float, float]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One case: weights in one format, or the baseline's, and a step of so many tokens.

    Attributes:
        weights: name of the operator's format, or ``baseline``.
        format, head_format: of the layers' weights and of the output head's.
        tokens: of the step, all of one request.
        layers, head: all layers, and the output head for all tokens.
        step: both, one after the other.
        baseline: the baseline's step of as many tokens; ``null`` for itself, or where it was left out.
        largest_difference: of a layer's results to its definition's and of the head's to PyTorch's with the same
            numbers, over the largest result.
    """

    weights: str
    format: str
    head_format: str
    tokens: int
    layers: PartTime
    head: PartTime
    step: PartTime
    baseline: Comparison | None
    largest_difference: float


@dataclass(frozen=True, slots=True)
class LeftOutWeights:
    """Weights, or the baseline, that were not measured, and why."""

    weights: str
    reason: str


@dataclass(frozen=True, slots=True)
class LayerReport(CommonReport):
    """A whole report.

    Attributes:
        peak: of float32 arithmetic.
        shape: of the model.
        context: tokens before the step's.
        page_size: tokens of one page of keys and values.
        baseline: what the operator is measured against.
        copies: of all weights, taken in turn so that none is found in the caches.
        rounds: that were measured so far.
        rows, left_out: the cases.
        missing_libraries: what could not be the baseline's.
    """

    peak: Peak
    shape: LayerShape
    context: int
    page_size: int
    baseline: str
    copies: int
    rounds: int
    rows: tuple[LayerRow, ...]
    left_out: tuple[LeftOutWeights, ...]
    missing_libraries: tuple[MissingLibrary, ...]
    kernel: str = "layer"
    schema_version: int = SCHEMA_VERSION


def render_layer_report(report: LayerReport) -> str:
    """The report as lines of text: what was measured, and the rows as a table."""
    return "\n".join(_lines(report))


def _lines(report: LayerReport) -> Iterator[str]:
    shape = report.shape
    yield bounds_line(report, report.peak)
    yield (
        f"a verify step of one request behind {report.context} tokens: {shape.layers} layers of {shape.hidden}, "
        f"{shape.intermediate} inside, {shape.heads} heads, {shape.kv_heads} key heads, head_dim {shape.head_dim}; "
        f"output head {shape.head}; float32 keys and values in pages of {report.page_size} tokens"
    )
    yield (
        f"weights of its own for each layer, read from memory; medians of {report.rounds} rounds; rates and ratios are "
        "those of the step"
    )
    yield operator_line(report.operator, report.operator_compiled)
    yield f"baseline: {report.baseline}"
    yield ""
    yield align_columns([_HEADER, *map(_cells, report.rows)], numbers_from=1)
    for missing in report.missing_libraries:
        yield f"not the baseline's: {missing.library}: {missing.reason}"
    for case in report.left_out:
        yield f"left out: {case.weights}: {case.reason}"


def _cells(row: LayerRow) -> tuple[str, ...]:
    baseline = ("-", "-")
    if row.baseline:
        baseline = (milliseconds(row.baseline.seconds), f"{row.baseline.speedup:.2f}x")
    return (
        row.weights if row.format == row.head_format else f"{row.weights}, head {row.head_format}",
        str(row.tokens),
        milliseconds(row.layers.seconds),
        milliseconds(row.head.seconds),
        milliseconds(row.step.seconds),
        f"{row.step.steps_of_one:.2f}",
        *rate_cells(row.step),
        *baseline,
    )
