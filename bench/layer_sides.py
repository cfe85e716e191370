"""The ways of running a decoder layer: our operator with weights in one format, and PyTorch's operators."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from bench.kernel_baselines import grouped_attention
from bench.kernel_cases import PagePool
from bench.layer_shape import LayerShape
from bench.linear_products import Product, held_bytes, operator_product, weight_bytes
from cuda_ext import ops
from cuda_ext.decoder import DecoderLayerWeights
from cuda_ext.linear import WeightFormat
from cuda_ext.reference import rms_norm, rotate
from drafter.model import RotaryEmbedding

__all__ = [
    "BASELINE",
    "LayerSide",
    "LibrarySide",
    "OperatorSide",
    "Step",
    "Vectors",
    "decoder_weights",
    "layer_arguments",
    "make_step",
    "memory_bytes",
    "part_bytes",
    "random_vectors",
]

BASELINE = "baseline"
_EPS = 1e-5
_THETA = 1e4
_BLOCKED = (WeightFormat.Q8_0, WeightFormat.Q4_1)

States = tuple[torch.Tensor, torch.Tensor]
"""What a layer adds to the residual stream last, and the stream before that, each ``[tokens, hidden]``."""


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer gets besides its weights and its pages: the new tokens of one request.

    Attributes:
        hidden: ``[tokens, hidden]`` float32, the embeddings.
        positions, slot_mapping, block_tables, context_lens, query_starts, rotary_table, scale: see
            ``cuda_ext.reference.decoder_layer``.
        places: for the baseline, page and place in it of each token, int64 ``[tokens]``.
        mask: for the baseline, what heads that share keys see, see ``grouped_attention``.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    rotary_table: torch.Tensor
    scale: float
    places: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor

    @property
    def tokens(self) -> int:
        """New tokens."""
        return len(self.hidden)


def make_step(shape: LayerShape, context: int, tokens: int, table: torch.Tensor, page_size: int) -> Step:
    """A step of new tokens behind a context.

    Args:
        shape: of the model.
        context: tokens before the new ones.
        tokens: new ones.
        table: block table ``[1, pages]`` int32 of all of them.
        page_size: tokens of a page.
    """
    positions = torch.arange(context, context + tokens)
    pages, offsets = table[0, positions // page_size].long(), positions % page_size
    return Step(
        hidden=torch.randn(tokens, shape.hidden, generator=torch.Generator().manual_seed(tokens)),
        positions=positions,
        slot_mapping=pages * page_size + offsets,
        block_tables=table,
        context_lens=torch.tensor([context + tokens], dtype=torch.int32),
        query_starts=torch.tensor([0, tokens], dtype=torch.int32),
        rotary_table=RotaryEmbedding(shape.head_dim, _THETA).covering(positions),
        scale=float(shape.head_dim**-0.5),
        places=(pages, offsets),
        mask=(torch.arange(context + tokens) <= positions[:, None]).repeat(shape.heads // shape.kv_heads, 1),
    )


@dataclass(frozen=True, slots=True)
class Vectors:
    """What a layer has besides its four weights, see ``DecoderLayerWeights``."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None


def random_vectors(shape: LayerShape, generator: torch.Generator) -> Vectors:
    """Norms around one and a bias around zero, where the model has them."""

    def around(mean: float, size: int) -> torch.Tensor:
        return mean + torch.randn(size, generator=generator) / 4

    return Vectors(
        input_norm=around(1, shape.hidden),
        post_norm=around(1, shape.hidden),
        qkv_bias=around(0, shape.weights[0].out_features) if shape.qkv_bias else None,
        query_norm=around(1, shape.head_dim) if shape.head_norms else None,
        key_norm=around(1, shape.head_dim) if shape.head_norms else None,
    )


class LayerSide(Protocol):
    """A way of running layers.

    Attributes:
        product, head: how it multiplies, in the layers and with the output head.
    """

    name: str
    product: Product
    head: Product

    def layer(self, prepared: Sequence[Any], vectors: Vectors) -> Any:
        """A layer of what ``product`` made of its four weights."""

    def run(
        self, layer: Any, hidden: torch.Tensor, residual: torch.Tensor | None, pages: PagePool, step: Step
    ) -> States:
        """One layer: see ``cuda_ext.reference.decoder_layer`` for what it takes and gives."""


def part_bytes(side: LayerSide, shape: LayerShape) -> tuple[int, int]:
    """Bytes that a run reads: of the weights of all layers, and of the output head's."""
    layer = sum(weight_bytes(side.product.format, weight) for weight in shape.weights)
    return shape.layers * layer, weight_bytes(side.head.format, shape.head)


def memory_bytes(side: LayerSide, shape: LayerShape) -> int:
    """What one copy of these takes up."""
    layer = sum(held_bytes(side.product.format, weight) for weight in shape.weights)
    return shape.layers * layer + held_bytes(side.head.format, shape.head)


class OperatorSide:
    """Our operator, one call a layer. Beside blocks of 4 bits the output head has Q8_0, as GGUF files do."""

    def __init__(self, format: str, shape: LayerShape):
        self.name = format
        self.product = operator_product(WeightFormat(format))
        self.head = operator_product(WeightFormat.Q8_0 if WeightFormat(format) in _BLOCKED else WeightFormat(format))
        self._shape = shape

    def layer(self, prepared: Sequence[Any], vectors: Vectors) -> tuple[object, ...]:
        """The operator's last arguments."""
        return decoder_weights(self._shape, prepared, vectors).arguments

    def run(
        self,
        layer: tuple[object, ...],
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        pages: PagePool,
        step: Step,
    ) -> States:
        """See ``LayerSide``."""
        result: States = ops.decoder_layer(*layer_arguments(hidden, residual, pages, step), *layer)
        return result


def decoder_weights(shape: LayerShape, prepared: Sequence[Any], vectors: Vectors) -> DecoderLayerWeights:
    """The operator's weights of packed ones."""
    qkv, output, gate_up, down = prepared
    return DecoderLayerWeights(
        vectors.input_norm,
        vectors.post_norm,
        _EPS,
        qkv,
        output,
        gate_up,
        down,
        shape.heads,
        vectors.qkv_bias,
        vectors.query_norm,
        vectors.key_norm,
    )


def layer_arguments(
    hidden: torch.Tensor, residual: torch.Tensor | None, pages: PagePool, step: Step
) -> tuple[object, ...]:
    """The operator's arguments before those of the weights."""
    return (
        *(hidden, residual, step.positions, pages.keys, pages.values, step.slot_mapping, step.block_tables),
        *(step.context_lens, step.query_starts, step.rotary_table, step.scale),
    )


class LibrarySide:
    """PyTorch's operators one by one, with float32 weights that a library multiplies with."""

    name = BASELINE

    def __init__(self, library: Product, shape: LayerShape):
        self.product = self.head = library
        self._shape = shape

    def __str__(self) -> str:
        return (
            f"the same layers of PyTorch's operators, one after the other: {self.product.name} with float32 weights in "
            "the library's own layout, F.rms_norm, rotation, F.scaled_dot_product_attention over gathered pages, F.silu"
        )

    def layer(self, prepared: Sequence[Any], vectors: Vectors) -> tuple[Sequence[Any], Vectors]:
        """Both as they are."""
        return prepared, vectors

    def run(
        self,
        layer: tuple[Sequence[Any], Vectors],
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        pages: PagePool,
        step: Step,
    ) -> States:
        """See ``LayerSide``."""
        (qkv, output, gate_up, down), vectors = layer
        multiply = self.product.multiply
        stream = hidden if residual is None else hidden + residual
        mixed = multiply(rms_norm(stream, vectors.input_norm, _EPS), qkv)
        if vectors.qkv_bias is not None:
            mixed = mixed + vectors.qkv_bias
        stream = stream + multiply(self._attended(mixed, vectors, pages, step), output)
        gate, up = multiply(rms_norm(stream, vectors.post_norm, _EPS), gate_up).chunk(2, dim=-1)
        return multiply(F.silu(gate) * up, down), stream

    def _attended(self, qkv: torch.Tensor, vectors: Vectors, pages: PagePool, step: Step) -> torch.Tensor:
        """Store keys and values, gather those of the whole context, attend: ``[tokens, heads * head_dim]``."""
        shape = self._shape
        heads = qkv.unflatten(-1, (-1, shape.head_dim))
        query, key, value = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        query, key = (
            rotate(rms_norm(part, norm, _EPS), step.rotary_table, step.positions)
            for part, norm in ((query, vectors.query_norm), (key, vectors.key_norm))
        )
        gathered = []
        for cache, new in ((pages.keys, key), (pages.values, value)):
            cache[step.places] = new
            rows = cache.index_select(0, step.block_tables[0]).flatten(0, 1)[: step.mask.shape[1]]
            gathered.append(rows.transpose(0, 1)[None])
        attended = grouped_attention(query[None], gathered[0], gathered[1], step.mask, step.scale)
        return attended[0].flatten(1)
