"""Timing the attention operator in alternation with what it replaces, and the memory that bounds them all."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.errors import BenchError
from bench.kernel_baselines import Batch, BufferedAttention, PlainAttention, make_batch
from bench.kernel_report import Comparison, KernelRow, KernelShape
from bench.machine import describe_machine
from cuda_ext import ops

__all__ = [
    "Clock",
    "PagePool",
    "alternate",
    "alternating_rounds",
    "common_facts",
    "compare",
    "measure_case",
    "read_bandwidth",
    "threads",
]

Clock = Callable[[], float]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From keys, values and a block table to what the slots attend to."""

_TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
"""What results may differ by: a few roundings of values of about 1."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use this many threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def common_facts(repeats: int, bandwidth: float, cache_bytes: int | None) -> dict[str, Any]:
    """The attributes of a ``CommonReport`` of which no case has been measured.

    Args:
        repeats: runs of each in each case.
        bandwidth: of the memory, bytes per second.
        cache_bytes: what the outermost caches hold, if known.
    """
    return {
        "complete": False,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": (Path(sys.argv[0]).name, *sys.argv[1:]),
        "machine": describe_machine(),
        "operator": ops.kernels().cpu,
        "operator_compiled": ops.kernels().cpu_compiled,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "memory_gb_per_second": bandwidth / 1e9,
        "cache_bytes": cache_bytes,
    }


def read_bandwidth(size: int = 512 * 2**20, repeats: int = 7, clock: Clock = time.perf_counter) -> float:
    """What this machine's memory gives, in bytes per second: a buffer is summed up, by as many threads as torch has.

    The same bytes are added as float32 and as int64 numbers, whichever is less work; the best run counts, since what
    disturbs a run only ever makes it longer.

    Args:
        size: of the buffer, bytes; should be much larger than the caches.
        repeats: runs of each kind.
        clock: seconds.
    """
    buffer = torch.zeros(size // 8, dtype=torch.int64)
    best = float("inf")
    for numbers in (buffer, buffer.view(torch.float32)) * repeats:
        began = clock()
        numbers.sum()
        best = min(best, clock() - began)
    return buffer.nbytes / best


class PagePool:
    """Random keys and values in pages, handed out in random order and in turn.

    A run that gets its pages here finds them in no cache if the whole pool is larger than the caches.

    Args:
        shape: of the keys and values.
        pages: how many.
        seed: of everything random.
    """

    def __init__(self, shape: KernelShape, pages: int, seed: int = 0):
        self._generator = torch.Generator().manual_seed(seed)
        self._shape = shape
        size = (pages, 2, shape.page_size, shape.kv_heads, shape.head_dim)
        data = torch.empty(size, dtype=getattr(torch, shape.dtype)).normal_(generator=self._generator)
        self.keys, self.values = data[:, 0], data[:, 1]

    def tables(self, context: int, requests: int) -> list[torch.Tensor]:
        """Block tables ``[requests, pages]`` int32 of as many batches as the pool holds, without a page in common."""
        width = self._shape.pages(context)
        order = torch.randperm(len(self.keys), generator=self._generator, dtype=torch.int32)
        whole = len(order) // (requests * width)
        return list(order[: whole * requests * width].view(whole, requests, width))


def measure_case(
    shape: KernelShape,
    context: int,
    requests: int,
    pool: PagePool,
    repeats: int,
    bandwidth: float,
    clock: Clock = time.perf_counter,
) -> KernelRow:
    """Run the operator and both baselines in alternation.

    Args:
        shape: see there.
        context: tokens before each block.
        requests: in the batch.
        pool: where the pages are from.
        repeats: runs of each.
        bandwidth: of the memory, bytes per second.
        clock: seconds.

    Raises:
        BenchError: the operator refuses the shape, or the results differ.
    """
    batch = make_batch(shape, context, requests)
    sides = (_operator(batch), PlainAttention(batch), BufferedAttention(batch, shape))
    tables = pool.tables(context, requests)
    with torch.inference_mode():
        difference = _difference(shape, sides, pool, tables[0])
        # Each run gets other pages than the one before.
        turn = cycle(tables)
        runs = [partial(_attend_to_next, side, pool, turn) for side in sides]
        ours, plain, buffered = alternate(runs, repeats, clock)
    seconds = median(ours)
    kv_bytes = requests * (context + shape.slots) * shape.token_bytes
    return KernelRow(
        context=context,
        requests=requests,
        operator_seconds=seconds,
        sdpa=compare(ours, plain),
        buffered_sdpa=compare(ours, buffered),
        kv_bytes=kv_bytes,
        gb_per_second=kv_bytes / seconds / 1e9,
        bandwidth_share=kv_bytes / seconds / bandwidth,
        largest_difference=difference,
    )


def _operator(batch: Batch) -> Attention:
    def attend(keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        block = (batch.query, batch.block_key, batch.block_value)
        result: torch.Tensor = ops.block_attention(
            *block, keys, values, table, batch.context_lens, batch.visible, batch.scale
        )
        return result

    return attend


def _difference(shape: KernelShape, sides: Sequence[Attention], pool: PagePool, table: torch.Tensor) -> float:
    """Run all once, which also lets them allocate what they keep, and compare; wrong results are not worth timing."""
    operator, *baselines = sides
    try:
        ours = operator(pool.keys, pool.values, table).float()
    except RuntimeError as error:
        raise BenchError(f"the operator refuses this shape: {str(error).splitlines()[0]}") from error
    theirs = torch.stack([attend(pool.keys, pool.values, table) for attend in baselines]).float()
    difference = float((ours - theirs).abs().max())
    if not difference <= _TOLERANCES[shape.dtype]:
        raise BenchError(
            f"operator and gather + SDPA differ by {difference:.2g}, expected at most {_TOLERANCES[shape.dtype]:.2g}"
        )
    return difference


def _attend_to_next(attend: Attention, pool: PagePool, tables: Iterator[torch.Tensor]) -> torch.Tensor:
    return attend(pool.keys, pool.values, next(tables))


def alternating_rounds(sides: Sequence[Callable[[], object]], repeats: int, clock: Clock) -> Iterator[list[float]]:
    """Run every side once a round; seconds of each, by round. Who goes first changes from round to round."""
    for repeat in range(repeats):
        seconds = [0.0] * len(sides)
        for index in range(len(sides)):
            side = (repeat + index) % len(sides)
            began = clock()
            sides[side]()
            seconds[side] = clock() - began
        yield seconds


def alternate(sides: Sequence[Callable[[], object]], repeats: int, clock: Clock) -> list[list[float]]:
    """Seconds of each side's runs, in the order of the repeats; see ``alternating_rounds``."""
    return [list(seconds) for seconds in zip(*alternating_rounds(sides, repeats, clock), strict=True)]


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Seconds of runs that alternated, ours and something else's."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    return Comparison(median(theirs), median(ratios), (min(ratios), max(ratios)))
