"""Timing the linear operator in alternation with the libraries, and the arithmetic that bounds them all."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from bench.errors import BenchError
from bench.kernel_cases import Clock, alternate, compare
from bench.linear_products import Product, held_bytes, operator_product, weight_bytes
from bench.linear_report import FormatTime, LibraryTime, LinearRow, Peak, WeightShape
from cuda_ext.linear import WeightFormat

__all__ = [
    "Sides",
    "Weights",
    "checked_difference",
    "measure_peak",
    "product_difference",
    "random_matrix",
    "rate_facts",
]

_TOLERANCE = 1e-4
"""What results may differ by, over the largest: float32 sums in another order."""

_PEAK_ROWS, _PEAK_INPUTS, _PEAK_OUTPUTS = 64, 512, 128


def measure_peak(repeats: int = 5, side: int = 2048, clock: Clock = time.perf_counter) -> Peak:
    """The most products and sums a second that this machine does here: of the operator on a weight that stays in the
    caches, and of PyTorch's product of two large matrices; the best run counts.

    Args:
        repeats: runs of the product of matrices; the operator, whose runs are short, gets a hundred times as many.
        side: of the matrices.
        clock: seconds.
    """
    outputs = _PEAK_OUTPUTS * torch.get_num_threads()
    operator = operator_product(WeightFormat.FLOAT32)
    rows, packed = torch.randn(_PEAK_ROWS, _PEAK_INPUTS), operator.prepare(torch.randn(outputs, _PEAK_INPUTS))
    matrix = torch.randn(side, side)
    in_caches = _best(partial(operator.multiply, rows, packed), 100 * repeats, clock)
    large = _best(partial(torch.mm, matrix, matrix), repeats, clock)
    peaks = (
        Peak(
            2 * _PEAK_ROWS * outputs * _PEAK_INPUTS / in_caches / 1e9,
            f"the operator with {_PEAK_ROWS} rows and a weight {outputs}x{_PEAK_INPUTS} in the caches",
        ),
        Peak(2 * side**3 / large / 1e9, f"torch.mm of {side}x{side} matrices"),
    )
    return max(peaks, key=lambda peak: peak.gflops)


def _best(run: Callable[[], object], repeats: int, clock: Clock) -> float:
    run()
    return min(alternate([run], repeats, clock)[0])


class Sides:
    """What is measured side by side.

    Args:
        formats: names of the formats that the operator is measured with.
        libraries: what it is measured against.
        cache_bytes: what the outermost caches hold.
    """

    def __init__(self, formats: Iterable[str], libraries: Sequence[Product], cache_bytes: int):
        self.operators = [operator_product(WeightFormat(name)) for name in formats]
        self.libraries = libraries
        self._cache_bytes = cache_bytes

    @property
    def all(self) -> Sequence[Product]:
        """The operator's, then the libraries'."""
        return [*self.operators, *self.libraries]

    def copies(self, shape: WeightShape) -> int:
        """Copies of the weights that the runs have to go through in turn to find none of them in a cache.

        Before a copy's turn comes again every side has run as often as there are other copies; what they have read
        by then is twice what the caches hold.
        """
        return 1 + -(-2 * self._cache_bytes // sum(weight_bytes(side.format, shape) for side in self.all))

    def memory_bytes(self, shape: WeightShape) -> int:
        """All copies, each in whole huge pages, and the float32 numbers that they are made from."""
        one = sum(held_bytes(side.format, shape) for side in self.all)
        return self.copies(shape) * one + 3 * 4 * shape.numbers

    def weights(self, shape: WeightShape, seed: int = 0) -> "Weights":
        """Random weights for all sides."""
        return Weights(self, shape, seed)


class Weights:
    """All sides with their copies of one weight; see ``Sides``."""

    def __init__(self, sides: Sides, shape: WeightShape, seed: int):
        self._sides, self._shape = sides, shape
        self._prepared: Mapping[str, list[Any]] = {side.name: [] for side in sides.all}
        generator = torch.Generator().manual_seed(seed)
        for _ in range(sides.copies(shape)):
            weight = random_matrix(shape, generator)
            for side in sides.all:
                self._prepared[side.name].append(side.prepare(weight))
        self._last = weight

    def differences(self, row_counts: Iterable[int]) -> dict[str, float]:
        """How far each format's results are from PyTorch's on the same numbers, over the largest result.

        Wrong results are not worth timing.

        Args:
            row_counts: rows of the products that will be timed.

        Raises:
            BenchError: results differ by more than another order of the sums explains, or the operator refuses.
        """
        cases = [self._rows(count) for count in row_counts]
        found = {}
        for side in self._sides.all:
            prepared = self._prepared[side.name][-1]
            numbers = side.numbers(self._last, prepared)
            found[side.name] = max(product_difference(side, rows, prepared, numbers) for rows in cases)
        return found

    def measure(
        self,
        rows: int,
        repeats: int,
        bandwidth: float,
        peak: Peak,
        differences: Mapping[str, float],
        clock: Clock = time.perf_counter,
    ) -> LinearRow:
        """Run all sides in alternation.

        Args:
            rows: of the product.
            repeats: runs of each side.
            bandwidth: of the memory, bytes per second.
            peak: of the arithmetic.
            differences: of the results, see there.
            clock: seconds.
        """
        inputs = self._rows(rows)
        runs = [self._runs(side, inputs) for side in self._sides.all]
        for run in runs:  # libraries prepare themselves for a number of rows
            run()
        seconds = alternate(runs, repeats, clock)
        flops = 2 * rows * self._shape.numbers
        ours, theirs = seconds[: len(self._sides.operators)], seconds[len(self._sides.operators) :]
        best = min(range(len(theirs)), key=lambda index: median(theirs[index]))
        return LinearRow(
            shape=self._shape,
            rows=rows,
            best_library=self._sides.libraries[best].name,
            libraries=tuple(
                LibraryTime(library.name, median(times), flops / median(times) / 1e9)
                for library, times in zip(self._sides.libraries, theirs, strict=True)
            ),
            formats=tuple(
                self._format_time(operator, times, theirs[best], flops, bandwidth, peak, differences[operator.name])
                for operator, times in zip(self._sides.operators, ours, strict=True)
            ),
        )

    def _format_time(
        self,
        operator: Product,
        ours: Sequence[float],
        theirs: Sequence[float],
        flops: int,
        bandwidth: float,
        peak: Peak,
        difference: float,
    ) -> FormatTime:
        seconds, size = median(ours), weight_bytes(operator.format, self._shape)
        return FormatTime(
            format=operator.name,
            best_library=compare(ours, theirs),
            largest_difference=difference,
            **rate_facts(seconds, size, flops, bandwidth, peak),
        )

    def _runs(self, side: Product, rows: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A run of a side with the copy whose turn it is."""
        turn = cycle(self._prepared[side.name])
        return lambda: side.multiply(rows, next(turn))

    def _rows(self, count: int) -> torch.Tensor:
        return torch.randn(count, self._shape.in_features, generator=torch.Generator().manual_seed(count))


def random_matrix(shape: WeightShape, generator: torch.Generator) -> torch.Tensor:
    """A weight whose products with inputs of about one are of about one."""
    return torch.randn(shape.out_features, shape.in_features, generator=generator).mul_(shape.in_features**-0.5)


def rate_facts(seconds: float, weight_bytes: int, flops: int, bandwidth: float, peak: Peak) -> dict[str, Any]:
    """The attributes of ``Rates``.

    Args:
        seconds: median of the runs.
        weight_bytes: that one run has to read.
        flops: products and sums of one run.
        bandwidth: of the memory, bytes per second.
        peak: of the arithmetic.
    """
    return {
        "seconds": seconds,
        "weight_bytes": weight_bytes,
        "gb_per_second": weight_bytes / seconds / 1e9,
        "bandwidth_share": weight_bytes / seconds / bandwidth,
        "gflops": flops / seconds / 1e9,
        "peak_share": flops / seconds / 1e9 / peak.gflops,
    }


def product_difference(side: Product, rows: torch.Tensor, prepared: Any, numbers: torch.Tensor) -> float:
    """How far a side's product of ``rows`` is from PyTorch's with the weight's ``numbers``; see there."""
    return checked_difference(
        side.name,
        "F.linear on the same numbers",
        f"{len(rows)} rows",
        partial(side.multiply, rows, prepared),
        partial(F.linear, rows, numbers),
    )


def checked_difference(
    name: str, other: str, size: str, ours: Callable[[], torch.Tensor], expected: Callable[[], torch.Tensor]
) -> float:
    """Largest difference of two results, over the largest of the second.

    Args:
        name, other: whose results they are.
        size: of the case.
        ours: runs first.
        expected: runs then.

    Raises:
        BenchError: ours refuses the shape, or the results differ by more than another order of the sums explains.
    """
    try:
        result = ours()
    except RuntimeError as error:
        raise BenchError(f"{name} refuses this shape: {str(error).splitlines()[0]}") from error
    right = expected()
    difference = float((result - right).abs().max() / right.abs().max())
    if not difference <= _TOLERANCE:
        raise BenchError(
            f"{name} and {other} differ by {difference:.2g} of the largest result with {size}, expected at most "
            f"{_TOLERANCE:.2g}"
        )
    return difference
