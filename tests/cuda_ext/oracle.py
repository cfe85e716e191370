"""What the operators should compute, written once more in loops over rows in double precision, and inputs for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]


def block_attention(
    query: torch.Tensor,
    block_key: torch.Tensor,
    block_value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one row after the other, see ``cuda_ext.reference.block_attention``; float64."""
    requests, queries, heads, head_dim = query.shape
    group = heads // block_key.shape[2]
    output = np.zeros((requests, queries, heads, head_dim))
    for r in range(requests):
        keys, values = (_context(pages, block_tables[r], int(context_lens[r])) for pages in (key_cache, value_cache))
        rows, slot_keys, slot_values = (_floats(tensor[r]) for tensor in (query, block_key, block_value))
        for q in range(queries):
            slots = int(visible[r, q])
            for head in range(heads):
                of_group = head // group
                seen_keys = np.concatenate([keys[:, of_group], slot_keys[:slots, of_group]])
                seen_values = np.concatenate([values[:, of_group], slot_values[:slots, of_group]])
                output[r, q, head] = _softmax_mean(scale * (seen_keys @ rows[q, head]), seen_values)
    return torch.from_numpy(output)


def rms_norm(row: Floats, weight: torch.Tensor | None, eps: float) -> Floats:
    """Root-mean-square norm of one row ``[head_dim]``; without a weight, the row."""
    if weight is None:
        return row
    norm: Floats = row / np.sqrt(np.mean(row * row) + eps) * _floats(weight)
    return norm


def rotate(row: Floats, angles: torch.Tensor) -> Floats:
    """Turn the pairs (i, i + head_dim / 2) of one row as complex numbers by ``angles`` ``[head_dim / 2]``."""
    half = len(row) // 2
    turned = (row[:half] + 1j * row[half:]) * np.exp(1j * _floats(angles))
    return np.concatenate([turned.real, turned.imag])


def rotary_table(angles: torch.Tensor) -> torch.Tensor:
    """The table ``[positions, 2, head_dim]`` that the operators take, of ``angles`` ``[positions, head_dim / 2]``."""
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosine, cosine], 1), torch.cat([-sine, sine], 1)], dim=1).float()


def _context(pages: torch.Tensor, table: torch.Tensor, length: int) -> Floats:
    """Rows ``[length, kv_heads, head_dim]`` of one request, fetched one by one."""
    page_size = pages.shape[1]
    rows = [_floats(pages[int(table[token // page_size]), token % page_size]) for token in range(length)]
    return np.stack(rows) if rows else np.zeros((0, *pages.shape[2:]))


def _softmax_mean(scores: Floats, values: Floats) -> Floats:
    """Nothing seen is zero by definition."""
    if not len(scores):
        return np.zeros(values.shape[1])
    weights = np.exp(scores - scores.max())
    mean: Floats = weights @ values / weights.sum()
    return mean


def _floats(tensor: torch.Tensor) -> Floats:
    floats: Floats = tensor.double().numpy()
    return floats


@dataclass(frozen=True)
class Case:
    """Arguments of ``block_attention``."""

    query: torch.Tensor
    block_key: torch.Tensor
    block_value: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    visible: torch.Tensor
    scale: float

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def requests(self, *chosen: int) -> "Case":
        """The same with only these requests, in this order, as tensors of their own."""
        index = torch.tensor(chosen, dtype=torch.int64)
        names = ("query", "block_key", "block_value", "block_tables", "context_lens", "visible")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def queries(self, *chosen: int) -> "Case":
        """The same with only these queries of every request."""
        index = torch.tensor(chosen, dtype=torch.int64)
        return replace(self, query=self.query[:, index], visible=self.visible[:, index])

    def expected(self) -> torch.Tensor:
        return block_attention(*self.arguments)


@dataclass(frozen=True)
class Recipe:
    """How to make a case.

    Attributes:
        context_lens: tokens of each request.
        visible: of each request's queries.
        fused: queries, keys and values are views of one tensor, as a fused projection leaves them.
        interleaved: both caches are views of one tensor ``[pages, 2, page_size, kv_heads, head_dim]``.
        sharpness: factor on the scores' usual spread of 1.
    """

    context_lens: tuple[int, ...]
    visible: tuple[tuple[int, ...], ...]
    slots: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 4
    page_size: int = 3
    dtype: torch.dtype = torch.float32
    fused: bool = False
    interleaved: bool = False
    sharpness: float = 1.0
    seed: int = 0

    def make(self) -> Case:
        """Random numbers where somebody looks, and traps everywhere else.

        Rows of pages and of blocks that nobody sees hold NaN and infinities; entries of the block table behind the
        context are no page at all; pages lie in random order with unused ones between them.
        """
        generator = torch.Generator().manual_seed(self.seed)
        pages, tables = self._pages(generator)
        query, block_key, block_value = self._block(generator)
        for r, row in enumerate(self.visible):
            spoil(block_key[r, max(row, default=0) :])
            spoil(block_value[r, max(row, default=0) :])
        caches = (pages[:, 0], pages[:, 1])
        if not self.interleaved:
            caches = (caches[0].contiguous(), caches[1].contiguous())
        lengths = torch.tensor(self.context_lens, dtype=torch.int32)
        visible = torch.tensor(self.visible, dtype=torch.int32).view(len(self.context_lens), -1)
        scale = self.sharpness * self.head_dim**-0.5
        return Case(query, block_key, block_value, *caches, tables, lengths, visible, scale)

    def _pages(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        counts = [-(-length // self.page_size) for length in self.context_lens]
        order = torch.randperm(sum(counts) + 2, generator=generator).int()
        pages = torch.empty(len(order), 2, self.page_size, self.kv_heads, self.head_dim, dtype=self.dtype)
        spoil(pages)
        traps = torch.tensor([-1, len(order), 2**31 - 1, -(2**31)], dtype=torch.int32)
        tables = traps.repeat(len(counts), -(-(max(counts, default=0) + 1) // len(traps)))
        first = 0
        for r, (length, count) in enumerate(zip(self.context_lens, counts, strict=True)):
            tables[r, :count] = order[first : first + count]
            first += count
            rows = torch.randn(length, 2, self.kv_heads, self.head_dim, generator=generator).to(self.dtype)
            for index, piece in enumerate(rows.split(self.page_size) if length else ()):
                pages[tables[r, index], :, : len(piece)] = piece.transpose(0, 1)
        return pages, tables

    def _block(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        requests, queries = len(self.context_lens), len(self.visible[0]) if self.visible else 0
        width = max(queries, self.slots)
        qkv = torch.randn(requests, width, self.heads + 2 * self.kv_heads, self.head_dim, generator=generator)
        query, key, value = qkv.to(self.dtype).split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        parts = query[:, :queries], key[:, : self.slots], value[:, : self.slots]
        return parts if self.fused else (parts[0].contiguous(), parts[1].contiguous(), parts[2].contiguous())


def spoil(rows: torch.Tensor) -> None:
    """Fill with what must not come through, not even multiplied by zero."""
    rows.fill_(torch.nan)
    rows[..., ::2] = torch.inf


def causal(slots: int) -> tuple[int, ...]:
    """What a whole block sees: every slot itself and those before it."""
    return tuple(range(1, slots + 1))


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Let the compiled kernels use this instruction set, and again the best one afterwards."""
    torch.ops.slipstream.force_cpu_isa(name)
    try:
        yield
    finally:
        torch.ops.slipstream.force_cpu_isa("")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use this many threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
