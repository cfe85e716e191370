"""Timing all layers and the output head of a model by number of tokens, all ways of running them in alternation."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch

from bench.kernel_cases import Clock, PagePool, alternating_rounds, compare
from bench.kernel_report import KernelShape
from bench.layer_report import LayerRow, LeftOutWeights, PartTime
from bench.layer_shape import LayerShape
from bench.layer_sides import (
    BASELINE,
    LayerSide,
    Step,
    Vectors,
    decoder_weights,
    layer_arguments,
    make_step,
    memory_bytes,
    part_bytes,
    random_vectors,
)
from bench.linear_cases import checked_difference, product_difference, random_matrix, rate_facts
from bench.linear_report import Peak, WeightShape
from cuda_ext import reference
from cuda_ext.linear import pack

__all__ = ["LayerCases", "Steps", "copies", "fitting"]

_PARTS = ("layers", "head")
_Times = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""Seconds by round: of the layers, of the head, and of both together."""


def copies(sides: Sequence[LayerSide], shape: LayerShape, cache_bytes: int) -> int:
    """Copies of all weights that the runs have to go through in turn to find none of them in a cache.

    A side's weights come again after as many rounds of all sides as there are copies; what the others have read by
    then is at least twice what the caches hold.
    """
    parts = [size for side in sides for size in part_bytes(side, shape)]
    return -(-(2 * cache_bytes + max(parts)) // sum(parts))


def fitting(
    sides: Sequence[LayerSide], shape: LayerShape, cache_bytes: int, budget: float
) -> tuple[list[LayerSide], list[LeftOutWeights]]:
    """The sides whose weights fit into memory, and the others: the largest is left out as long as all do not fit.

    Args:
        sides: of two that are equally large the later one is left out first.
        shape: of the model.
        cache_bytes: what the outermost caches hold.
        budget: bytes for the weights.
    """
    kept, left_out = list(sides), []
    made = 3 * 4 * max(weight.numbers for weight in (*shape.weights, shape.head))  # one weight while it is packed
    while kept:
        count = copies(kept, shape, cache_bytes)
        needed = count * sum(memory_bytes(side, shape) for side in kept) + made
        if needed <= budget:
            break
        largest = kept.pop(max(range(len(kept)), key=lambda index: (memory_bytes(kept[index], shape), index)))
        others = f" and those of {', '.join(side.name for side in kept)}" if kept else ""
        times = f", {count} times over," if count > 1 else ""
        reason = f"its weights{others}{times} are {needed / 2**30:.3g} GiB, --max-gib is {budget / 2**30:g}"
        left_out.append(LeftOutWeights(largest.name, reason))
    return kept, left_out


class Steps:
    """Steps of several sizes over the same pages, of which every layer has its own.

    Args:
        shape: of the model.
        context: tokens before those of each step.
        tokens: of each step; 1 is among them.
        page_size: tokens of a page.
        seed: of everything random.
    """

    def __init__(self, shape: LayerShape, context: int, tokens: Sequence[int], page_size: int, seed: int = 0):
        self.context = context
        pages = KernelShape(shape.heads, shape.kv_heads, shape.head_dim, max(tokens), page_size, "float32")
        needed = pages.pages(context + max(tokens))
        self.pools = [PagePool(pages, needed, seed + layer) for layer in range(shape.layers)]
        (table,) = self.pools[0].tables(context + max(tokens), requests=1)
        self.all = [make_step(shape, context, count, table, page_size) for count in tokens]
        self.one = tokens.index(1)


class _Copy:
    """A model's weights as one side has them."""

    def __init__(self, side: LayerSide, pools: Sequence[PagePool]):
        self.layers: list[Any] = []
        self.output_head: Any = None
        self._side, self._pools = side, pools

    def run(self, part: str, step: Step) -> torch.Tensor:
        """All layers, or the output head for all tokens."""
        if part == "head":
            return self._side.head.multiply(step.hidden, self.output_head)
        hidden, residual = step.hidden, None
        for layer, pages in zip(self.layers, self._pools, strict=True):
            hidden, residual = self._side.run(layer, hidden, residual, pages, step)
        return hidden


class LayerCases:
    """Random weights for all sides, and their steps.

    Args:
        sides: at least one.
        shape: of the model.
        steps: what is run.
        count: copies of all weights.
        seed: of the weights.
    """

    def __init__(self, sides: Sequence[LayerSide], shape: LayerShape, steps: Steps, count: int, seed: int = 0):
        self._sides, self._shape, self._steps = sides, shape, steps
        self._generator = torch.Generator().manual_seed(seed)
        self._copies = [[_Copy(side, steps.pools) for side in sides] for _ in range(count)]
        for models in self._copies:
            for _ in range(shape.layers):
                matrices, vectors = self._random_layer()
                for side, model in zip(sides, models, strict=True):
                    model.layers.append(side.layer([side.product.prepare(matrix) for matrix in matrices], vectors))
            head = self._random_matrix(shape.head)
            for side, model in zip(sides, models, strict=True):
                model.output_head = side.head.prepare(head)

    def differences(self) -> dict[str, float]:
        """How far each side's results are from those of the definitions with the same numbers, over the largest.

        Wrong results are not worth timing.

        Raises:
            BenchError: results differ by more than another order of the sums explains, or a side refuses the shape.
        """
        matrices, vectors = self._random_layer()
        head = self._random_matrix(self._shape.head)
        pages, found = self._steps.pools[0], {}
        for side in self._sides:
            prepared = [side.product.prepare(matrix) for matrix in matrices]
            layer = side.layer(prepared, vectors)
            numbers = [side.product.numbers(*pair) for pair in zip(matrices, prepared, strict=True)]
            definition = decoder_weights(self._shape, [pack(matrix) for matrix in numbers], vectors).arguments
            output_head = side.head.prepare(head)
            head_numbers = side.head.numbers(head, output_head)
            found[side.name] = max(
                max(
                    _layer_difference(side, layer, definition, pages, step),
                    product_difference(side.head, step.hidden, output_head, head_numbers),
                )
                for step in self._steps.all
            )
        return found

    def warm_up(self) -> None:
        """Run everything once: libraries prepare themselves for a number of rows."""
        for models in self._copies:
            for model in models:
                for step in self._steps.all:
                    for part in _PARTS:
                        model.run(part, step)

    def rounds(self, repeats: int, clock: Clock = time.perf_counter) -> Iterator[list[float]]:
        """Run everything in alternation; seconds of each round's runs, in the order that ``rows`` takes them in."""
        turns = [(part, cycle(models)) for models in zip(*self._copies, strict=True) for part in _PARTS]
        runs = [partial(_run_next, turn, part, step) for step in self._steps.all for part, turn in turns]
        return alternating_rounds(runs, repeats, clock)

    def rows(
        self, rounds: Sequence[Sequence[float]], bandwidth: float, peak: Peak, differences: Mapping[str, float]
    ) -> tuple[LayerRow, ...]:
        """What was measured so far, side by side.

        Args:
            rounds: seconds of each.
            bandwidth: of the memory, bytes per second.
            peak: of the arithmetic.
            differences: of the results, see there.
        """
        columns = zip(*rounds, strict=True)
        times = [[_with_sum(next(columns), next(columns)) for _ in self._sides] for _ in self._steps.all]
        names = [side.name for side in self._sides]
        baseline = names.index(BASELINE) if BASELINE in names else None
        rows = []
        for index, side in enumerate(self._sides):
            for step, seconds in zip(self._steps.all, times, strict=True):
                parts = zip(seconds[index], times[self._steps.one][index], self._work(side, step), strict=True)
                layers, head, both = (_part_time(*part, bandwidth, peak) for part in parts)
                row = LayerRow(
                    weights=side.name,
                    format=side.product.format.value,
                    head_format=side.head.format.value,
                    tokens=step.tokens,
                    layers=layers,
                    head=head,
                    step=both,
                    baseline=None if baseline in (None, index) else compare(seconds[index][2], seconds[baseline][2]),
                    largest_difference=differences[side.name],
                )
                rows.append(row)
        return tuple(rows)

    def _work(self, side: LayerSide, step: Step) -> tuple[tuple[int, int], ...]:
        """Weight bytes, and products and sums: of the layers, of the head, and of both together."""
        layers_bytes, head_bytes = part_bytes(side, self._shape)
        layers_flops = self._shape.layers_flops(step.tokens, self._steps.context)
        head_flops = 2 * step.tokens * self._shape.head.numbers
        together = (layers_bytes + head_bytes, layers_flops + head_flops)
        return (layers_bytes, layers_flops), (head_bytes, head_flops), together

    def _random_layer(self) -> tuple[list[torch.Tensor], Vectors]:
        matrices = [self._random_matrix(shape) for shape in self._shape.weights]
        return matrices, random_vectors(self._shape, self._generator)

    def _random_matrix(self, shape: WeightShape) -> torch.Tensor:
        return random_matrix(shape, self._generator)


def _with_sum(layers: Sequence[float], head: Sequence[float]) -> _Times:
    return layers, head, [sum(pair) for pair in zip(layers, head, strict=True)]


def _part_time(
    seconds: Sequence[float], of_one: Sequence[float], work: tuple[int, int], bandwidth: float, peak: Peak
) -> PartTime:
    ratios = compare(of_one, seconds)
    return PartTime(
        **rate_facts(ratios.seconds, *work, bandwidth, peak),
        steps_of_one=ratios.speedup,
        steps_of_one_spread=ratios.speedup_spread,
    )


def _run_next(turn: Iterator[_Copy], part: str, step: Step) -> torch.Tensor:
    return next(turn).run(part, step)


def _layer_difference(
    side: LayerSide, layer: Any, definition: tuple[object, ...], pages: PagePool, step: Step
) -> float:
    """Of a layer's results, with what came before it in the residual stream."""
    inputs = (step.hidden, step.hidden.flip(0), pages, step)
    return checked_difference(
        side.name,
        "a layer's definition with the same numbers",
        f"{step.tokens} tokens",
        lambda: torch.cat(side.run(layer, *inputs)),
        lambda: torch.cat(reference.decoder_layer(*layer_arguments(*inputs), *definition)),  # type: ignore[arg-type]
    )
