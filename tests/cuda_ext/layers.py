"""Cases for the operators that run a whole decoder layer: weights, batches, and traps where nobody may look."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from cuda_ext.decoder import DecoderLayerWeights
from cuda_ext.linear import WeightFormat
from tests.cuda_ext.oracle import rotary_table, spoil
from tests.cuda_ext.weights import make_even

POSITIONS = 1024
EPS = 1e-5

Formats = tuple[WeightFormat, WeightFormat, WeightFormat, WeightFormat]
FLOAT32 = (WeightFormat.FLOAT32,) * 4


@dataclass(frozen=True)
class LayerShape:
    """What a layer is like.

    Attributes:
        formats: of the weights of queries, keys and values, of attention's output, and of the network's two halves.
        qkv_bias: as Qwen2 has it.
        head_norms: of queries and keys, as Qwen3 has them.
    """

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 64
    intermediate: int = 96
    formats: Formats = FLOAT32
    qkv_bias: bool = False
    head_norms: bool = False

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def weights(self) -> DecoderLayerWeights:
        return _weights(self)


@lru_cache(maxsize=32)
def _weights(shape: LayerShape) -> DecoderLayerWeights:
    attended = shape.heads * shape.head_dim
    sizes = [
        (shape.qkv_width, shape.hidden),
        (shape.hidden, attended),
        (2 * shape.intermediate, shape.hidden),
        (shape.hidden, shape.intermediate),
    ]
    pairs = enumerate(zip(shape.formats, sizes, strict=True))
    qkv, output, gate_up, down = (make_even(format, out, inputs, seed=i) for i, (format, (out, inputs)) in pairs)
    generator = torch.Generator().manual_seed(4)

    def around_one(size: int) -> torch.Tensor:
        return 1 + torch.randn(size, generator=generator) / 4

    return DecoderLayerWeights(
        input_norm=around_one(shape.hidden),
        post_norm=around_one(shape.hidden),
        eps=EPS,
        qkv=qkv,
        output=output,
        gate_up=gate_up,
        down=down,
        heads=shape.heads,
        qkv_bias=around_one(shape.qkv_width) - 1 if shape.qkv_bias else None,
        query_norm=around_one(shape.head_dim) if shape.head_norms else None,
        key_norm=around_one(shape.head_dim) if shape.head_norms else None,
    )


@lru_cache
def angles(head_dim: int) -> torch.Tensor:
    """``[positions, head_dim / 2]`` float64."""
    frequencies = 1000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return torch.arange(POSITIONS).double()[:, None] * frequencies


class Pages:
    """Keys and values of some requests in pages ``[pages, 2, page_size, kv_heads, head_dim]``, scattered.

    What was not written holds traps, unused pages lie between the others, and entries of the block tables behind a
    request's last page are no pages.

    Args:
        capacities: tokens that each request has pages for.
        layout: seed of the pages' order.
    """

    def __init__(
        self,
        shape: LayerShape,
        capacities: Sequence[int],
        page_size: int,
        dtype: torch.dtype = torch.float32,
        layout: int = 0,
    ):
        self.page_size = page_size
        counts = [-(-capacity // page_size) for capacity in capacities]
        order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(layout)).int()
        self.data = torch.empty(len(order), 2, page_size, shape.kv_heads, shape.head_dim, dtype=dtype)
        spoil(self.data)
        traps = torch.tensor([-1, len(order), 2**31 - 1, -(2**31)], dtype=torch.int32)
        self.tables = traps.repeat(len(counts), -(-(max(counts, default=0) + 1) // len(traps)))
        for table, pages in zip(self.tables, order[: sum(counts)].split(counts), strict=True):
            table[: len(pages)] = pages

    def slots(self, request: int, first: int, last: int) -> torch.Tensor:
        """Where tokens [first, last) of a request lie, int64."""
        tokens = torch.arange(first, last)
        return self.tables[request][tokens // self.page_size].long() * self.page_size + tokens % self.page_size

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """Keys and values ``[slots, 2, kv_heads, head_dim]``."""
        return self.data[slots // self.page_size, :, slots % self.page_size]

    def write(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        self.data[slots // self.page_size, :, slots % self.page_size] = rows.to(self.data.dtype)

    def caches(self, interleaved: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as the operators take them."""
        keys, values = self.data.unbind(1)
        return (keys, values) if interleaved else (keys.contiguous(), values.contiguous())


@dataclass(frozen=True)
class Case:
    """A call of one of the operators.

    Attributes:
        arguments: by name, in order.
        written: the two of them that the operator changes.
        written_rows: bool, by the first two dimensions of those, the rows that it changes.
    """

    operator: str
    shape: LayerShape
    arguments: dict[str, Any]
    written: tuple[str, str]
    written_rows: torch.Tensor

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def copied(self) -> dict[str, Any]:
        """The arguments with the written ones in memory of their own, in the same layout."""
        return self.arguments | {name: _twin(self.arguments[name]) for name in self.written}


@dataclass(frozen=True)
class Outcome:
    """What a call gives and what is in its caches, or its blocks, afterwards."""

    output: torch.Tensor
    stream: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def run(operations: ModuleType, case: Case) -> Outcome:
    """Call the operator, on copies of what it changes."""
    arguments = case.copied()
    output, stream = getattr(operations, case.operator)(*arguments.values())
    keys, values = (arguments[name] for name in case.written)
    return Outcome(output, stream, keys, values)


def layer_arguments(weights: DecoderLayerWeights) -> dict[str, Any]:
    """The operators' last arguments by name."""
    names = "input_norm post_norm eps panels scales formats heads intermediate qkv_bias query_norm key_norm"
    return dict(zip(names.split(), weights.arguments, strict=True))


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


@dataclass(frozen=True)
class DecoderRecipe:
    """How to make a call of ``decoder_layer``.

    Attributes:
        requests: of each, tokens before the new ones, and new ones.
        padding: rows behind those of the requests.
        unstored: new tokens, counted over all requests, whose keys and values stay what they are.
        interleaved: both caches are views of one tensor.
        dtype: of the caches.
    """

    requests: tuple[tuple[int, int], ...]
    shape: LayerShape = LayerShape()
    page_size: int = 5
    padding: int = 0
    unstored: tuple[int, ...] = ()
    residual: bool = True
    interleaved: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def make(self) -> Case:
        """Random numbers where somebody looks, and traps everywhere else."""
        shape, generator = self.shape, torch.Generator().manual_seed(self.seed)
        lengths = [before + new for before, new in self.requests]
        starts = torch.tensor([0, *[new for _, new in self.requests]]).cumsum(0)
        tokens = int(starts[-1]) + self.padding
        pages = Pages(shape, lengths, self.page_size, self.dtype, self.seed)
        slots, positions = torch.full((tokens,), -1), torch.randint(0, POSITIONS, (tokens,), generator=generator)
        for r, (before, new) in enumerate(self.requests):
            rows = slice(int(starts[r]), int(starts[r + 1]))
            slots[rows] = pages.slots(r, before, before + new)
            # Not the places in the context: a table of positions must be what tells.
            positions[rows] = torch.arange(new) + before + 3 * r
            stored = torch.randn(before, 2, shape.kv_heads, shape.head_dim, generator=generator)
            pages.write(pages.slots(r, 0, before), stored)
        kept = slots[list(self.unstored)]
        pages.write(kept, torch.randn(len(kept), 2, shape.kv_heads, shape.head_dim, generator=generator))
        slots[list(self.unstored)] = -1 - torch.arange(len(kept))
        keys, values = pages.caches(self.interleaved)
        written = torch.zeros(keys.shape[:2], dtype=torch.bool)
        written.view(-1)[slots[slots >= 0]] = True
        hidden, residual = torch.randn(2, tokens, shape.hidden, generator=generator)
        arguments = {
            "hidden": hidden,
            "residual": residual if self.residual else None,
            "positions": positions,
            "key_cache": keys,
            "value_cache": values,
            "slot_mapping": slots,
            "block_tables": pages.tables,
            "context_lens": torch.tensor(lengths, dtype=torch.int32),
            "query_starts": starts.int(),
            "rotary_table": rotary_table(angles(shape.head_dim)),
            "scale": shape.scale,
            **layer_arguments(shape.weights),
        }
        return Case("decoder_layer", shape, arguments, ("key_cache", "value_cache"), written)


@dataclass(frozen=True)
class DraftRecipe:
    """How to make a call of ``draft_layer``.

    Attributes:
        context_lens: tokens before each block.
        places: of each request's rows, negative for those that are not stored.
        visible: of each request's rows; by default every row sees up to its own place.
    """

    context_lens: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]
    slots: int
    visible: tuple[tuple[int, ...], ...] | None = None
    shape: LayerShape = LayerShape()
    page_size: int = 5
    residual: bool = True
    interleaved: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def make(self) -> Case:
        """Random numbers where somebody looks, and traps everywhere else."""
        shape, generator = self.shape, torch.Generator().manual_seed(self.seed)
        requests, queries = len(self.context_lens), len(self.places[0]) if self.places else 0
        pages = Pages(shape, self.context_lens, self.page_size, self.dtype, self.seed)
        for r, length in enumerate(self.context_lens):
            stored = torch.randn(length, 2, shape.kv_heads, shape.head_dim, generator=generator)
            pages.write(pages.slots(r, 0, length), stored)
        places = torch.tensor(self.places, dtype=torch.int64).view(requests, queries)
        visible = places + 1 if self.visible is None else torch.tensor(self.visible).view(requests, queries)
        block = torch.randn(2, requests, self.slots, shape.kv_heads, shape.head_dim, generator=generator)
        block = block.to(self.dtype)
        written = torch.zeros(requests, self.slots, dtype=torch.bool)
        for r in range(requests):
            written[r, places[r][places[r] >= 0]] = True
            spoil(block[:, r, int(visible[r].max()) if queries else 0 :])
        spoil_rows(block, written)
        keys, values = pages.caches(self.interleaved)
        hidden, residual = torch.randn(2, requests, queries, shape.hidden, generator=generator)
        arguments = {
            "hidden": hidden,
            "residual": residual if self.residual else None,
            "positions": torch.randint(0, POSITIONS, (requests, queries), generator=generator),
            "places": places,
            "visible": visible.int(),
            "block_key": block[0],
            "block_value": block[1],
            "key_cache": keys,
            "value_cache": values,
            "block_tables": pages.tables,
            "context_lens": torch.tensor(self.context_lens, dtype=torch.int32),
            "rotary_table": rotary_table(angles(shape.head_dim)),
            "scale": shape.scale,
            **layer_arguments(shape.weights),
        }
        return Case("draft_layer", shape, arguments, ("block_key", "block_value"), written)


def spoil_rows(block: torch.Tensor, chosen: torch.Tensor) -> None:
    """Spoil the ``chosen`` ``[requests, slots]`` of ``block`` ``[2, requests, slots, kv_heads, head_dim]``."""
    trap = torch.empty_like(block[:, :1, :1])
    spoil(trap)
    block.copy_(torch.where(chosen[..., None, None], trap, block))
