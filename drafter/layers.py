"""One decoder layer of the drafter as serving runs it: in one call of our CPU kernel, or operator by operator."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from cuda_ext import ops
from cuda_ext.decoder import DecoderLayerWeights
from cuda_ext.linear import PANEL, pack_exactly
from cuda_ext.reference import append_block
from drafter.model import DrafterLayer, RMSNorm
from drafter.packed import PackedLinear


@dataclass(frozen=True, slots=True)
class BlockRows:
    """The slots of each request's block that one pass computes.

    Attributes:
        positions: ``[requests, rows]`` int64 logical positions.
        places: ``[requests, rows]`` int64 physical places; negative for padding.
        visible: ``[requests, rows]`` int32 physical slots that each row sees.
    """

    positions: torch.Tensor
    places: torch.Tensor
    visible: torch.Tensor


@dataclass(frozen=True, slots=True)
class BlockContext:
    """What stands before each block.

    Attributes:
        block_tables: ``[requests, max_pages]`` int32.
        lengths: ``[requests]`` int32 tokens.
    """

    block_tables: torch.Tensor
    lengths: torch.Tensor


class ServingLayer(Protocol):
    """A decoder layer bound to its weights."""

    def write_context(
        self,
        features: torch.Tensor,
        rotary_table: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        pages: torch.Tensor,
    ) -> None:
        """Store keys and values of context ``features`` ``[tokens, hidden]``.

        Args:
            rotary_table: ``[positions, 2, head_dim]``.
            positions, slot_mapping: ``[tokens]`` int64.
            pages: ``[pages, 2, page_size, kv_heads, head_dim]`` keys and values, changed in place.
        """
        ...

    def run(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rotary_table: torch.Tensor,
        rows: BlockRows,
        context: BlockContext,
        pages: torch.Tensor,
        block: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run some slots of every block.

        Args:
            x: ``[requests, rows, hidden]``, what the layer before adds to ``residual``, or the input.
            residual: of the same shape; ``None`` before the first layer.
            rotary_table: ``[positions, 2, head_dim]``.
            pages: as above, read only.
            block: keys and values ``[requests, slots, kv_heads, head_dim]``, changed in place.

        Returns:
            What this layer adds to the residual stream last, and the stream before that.
        """
        ...


def serving_layer(layer: DrafterLayer, eps: float) -> ServingLayer:
    """The fastest form of ``layer`` on its device; ``eps`` is that of its norms."""
    weight = layer.down_proj.weight
    one_call = ops.kernels().cpu_compiled and weight.device.type == "cpu" and weight.dtype == torch.float32
    return _OneCallLayer(layer, eps) if one_call and weight.shape[1] % PANEL == 0 else _ModularLayer(layer, eps)


class _ContextWriter:
    """The half of a layer that both forms share."""

    def __init__(self, layer: DrafterLayer, eps: float):
        self._shape, self._eps, self._scale = (layer.kv_heads, layer.head_dim), eps, layer.head_dim**-0.5
        self._query_norm, self._key_norm = _weight(layer.q_norm), _weight(layer.k_norm)
        self._context_kv = PackedLinear(layer.qkv_proj.weight[layer.q_size :])

    def write_context(
        self,
        features: torch.Tensor,
        rotary_table: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        pages: torch.Tensor,
    ) -> None:
        kv_heads, head_dim = self._shape
        key, value = self._context_kv(features).view(-1, 2, kv_heads, head_dim).unbind(1)
        ops.write_context(
            key, value, self._key_norm, self._eps, rotary_table, positions, slot_mapping, *pages.unbind(1)
        )


class _OneCallLayer(_ContextWriter):
    def __init__(self, layer: DrafterLayer, eps: float):
        super().__init__(layer, eps)
        weights = DecoderLayerWeights(
            input_norm=layer.input_layernorm.weight.detach(),
            post_norm=layer.post_attention_layernorm.weight.detach(),
            eps=eps,
            qkv=pack_exactly(layer.qkv_proj.weight),
            output=pack_exactly(layer.o_proj.weight),
            gate_up=pack_exactly(layer.gate_up_proj.weight),
            down=pack_exactly(layer.down_proj.weight),
            heads=layer.heads,
            query_norm=self._query_norm,
            key_norm=self._key_norm,
        )
        self._arguments = weights.arguments

    def run(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rotary_table: torch.Tensor,
        rows: BlockRows,
        context: BlockContext,
        pages: torch.Tensor,
        block: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = ops.draft_layer(
            *(x, residual, rows.positions, rows.places, rows.visible, *block, *pages.unbind(1)),
            *(context.block_tables, context.lengths, rotary_table, self._scale, *self._arguments),
        )
        return result


class _ModularLayer(_ContextWriter):
    def __init__(self, layer: DrafterLayer, eps: float):
        super().__init__(layer, eps)
        self._input_norm, self._post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._qkv, self._o = PackedLinear(layer.qkv_proj.weight), PackedLinear(layer.o_proj.weight)
        self._gate_up, self._down = PackedLinear(layer.gate_up_proj.weight), PackedLinear(layer.down_proj.weight)

    def run(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rotary_table: torch.Tensor,
        rows: BlockRows,
        context: BlockContext,
        pages: torch.Tensor,
        block: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream = x if residual is None else x + residual
        norms = (self._query_norm, self._key_norm, self._eps)
        qkv = self._qkv(self._input_norm(stream))
        query = append_block(qkv, *norms, rotary_table, rows.positions, rows.places, *block)
        attended = ops.block_attention(
            *(query, *block, *pages.unbind(1), context.block_tables, context.lengths, rows.visible, self._scale)
        )
        stream = stream + self._o(attended.flatten(2))
        gate, up = self._gate_up(self._post_norm(stream)).chunk(2, dim=-1)
        return self._down(F.silu(gate) * up), stream


def _weight(norm: RMSNorm | None) -> torch.Tensor | None:
    return None if norm is None else norm.weight.detach()
