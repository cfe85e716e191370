"""In which order what is measured, and how long the rest will take."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Cell", "measuring_order", "seconds_left"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One measured load: one method over the prompts of one category, in one of the repeats."""

    repeat: int
    concurrency: int
    category: str
    method: str


def measuring_order(
    repeats: int, concurrencies: Sequence[int], categories: Sequence[str], methods: Sequence[str], seed: int
) -> tuple[Cell, ...]:
    """All cells in the order in which they are measured.

    The methods alternate inside of each (repeat, concurrency, category), in an order drawn anew each time: what the
    machine does meanwhile then hits all methods alike, and none always runs after the same other one.
    """
    draw = random.Random(seed)
    return tuple(
        Cell(repeat, concurrency, category, method)
        for repeat in range(repeats)
        for concurrency in concurrencies
        for category in categories
        for method in draw.sample(methods, len(methods))
    )


def seconds_left(measured: Sequence[tuple[Cell, float]], remaining: Iterable[Cell]) -> float | None:
    """An estimate of how long the remaining cells take.

    Each takes the mean of the measured cells that are like it: of its method and concurrency where there are any,
    else of its concurrency, else of all.

    Args:
        measured: finished cells and the seconds that each took.
        remaining: cells still to come.

    Returns:
        Seconds, or ``None`` as long as nothing is measured.
    """
    if not measured:
        return None
    samples: dict[tuple[str | None, int | None], list[float]] = {}
    for cell, seconds in measured:
        for key in _keys(cell):
            samples.setdefault(key, []).append(seconds)
    total = 0.0
    for cell in remaining:
        alike = next(samples[key] for key in _keys(cell) if key in samples)
        total += sum(alike) / len(alike)
    return total


def _keys(cell: Cell) -> tuple[tuple[str | None, int | None], ...]:
    return (cell.method, cell.concurrency), (None, cell.concurrency), (None, None)
