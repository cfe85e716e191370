"""The drafter's network as serving runs it: packed weights, paged context, the operators of ``cuda_ext``.

``drafter.model`` is the same network for training, in differentiable PyTorch; tests hold the two together.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cuda_ext import ops
from drafter.checkpoint import Drafter
from drafter.head import DraftHead
from drafter.model import DrafterLayer, RMSNorm
from drafter.packed import PackedLinear, PackedMarkovHead
from drafter.types import PagedCacheSpec, TargetModel


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


class BlockCache:
    """Keys and values of the slots of every block, per layer, in physical order.

    Slots computed by an earlier pass stay where they are, so that a refinement pass computes only what changed.
    """

    def __init__(self, layers: int, requests: int, slots: int, kv_heads: int, head_dim: int, device: torch.device):
        # Slots that a pass has not filled are never visible, but zeros keep accidents reproducible.
        self._data = torch.zeros(layers, 2, requests, slots, kv_heads, head_dim, device=device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[requests, slots, kv_heads, head_dim]``."""
        return self._data[index, 0], self._data[index, 1]


class ServingDrafter:
    """A drafter bound to a target, with its paged cache.

    Args:
        drafter: the loaded checkpoint.
        target: the parts it shares.
        cache: pages to allocate.
    """

    def __init__(self, drafter: Drafter, target: TargetModel, cache: PagedCacheSpec):
        model = drafter.model.to(target.embedding.device)
        self.config = config = model.config
        self._model, self._embedding = model, target.embedding
        head = drafter.head(target)
        markov = None if model.markov is None else PackedMarkovHead(model.markov)
        # Rounding the target's rows changes a draft now and then, and never an answer.
        packed = PackedLinear(head.weight, lossy=True)
        self.head = DraftHead(head.weight, head.token_ids, markov, packed)
        self._fc = PackedLinear(model.fc.weight)
        self._last_feature = PackedLinear(model.last_feature_proj.weight) if model.last_feature_proj else None
        self._layers = [_ServingLayer(layer, config.rms_norm_eps) for layer in model.layers]  # type: ignore[arg-type]
        shape = (cache.num_pages, 2, cache.page_size, config.num_kv_heads, config.head_dim)
        self.pages = [torch.zeros(shape, device=cache.device) for _ in range(config.num_layers)]

    def block_cache(self, requests: int, slots: int) -> BlockCache:
        """An empty cache for one block of each request."""
        config = self.config
        device = self._embedding.device
        return BlockCache(config.num_layers, requests, slots, config.num_kv_heads, config.head_dim, device)

    def context_features(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project ``[tokens, feature_size]`` concatenated hidden states to ``[tokens, hidden]``."""
        features: torch.Tensor = self._model.hidden_norm(self._fc(hidden_states))
        return features

    def write_context(self, features: torch.Tensor, positions: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Store the keys and values of context ``features`` ``[tokens, hidden]`` of every layer in the pages.

        Args:
            positions: ``[tokens]`` int64.
            slot_mapping: ``[tokens]`` int64; negative entries are skipped.
        """
        table = self._model.rotary.covering(positions)
        for layer, pages in zip(self._layers, self.pages, strict=True):
            layer.write_context(features, table, positions, slot_mapping, pages)

    def block_inputs(self, tokens: torch.Tensor, slots: torch.Tensor, last_features: torch.Tensor) -> torch.Tensor:
        """Inputs of chosen slots, see ``BlockDrafter.slot_inputs``."""
        bias = None if self._last_feature is None else self._last_feature(last_features)
        return self._model.slot_inputs(tokens, slots, bias, self._embedding)

    def run(self, inputs: torch.Tensor, rows: BlockRows, context: BlockContext, cache: BlockCache) -> torch.Tensor:
        """One pass over some slots of every block; their keys and values stay in ``cache``.

        Args:
            inputs: ``[requests, rows, hidden]``.

        Returns:
            Hidden states ``[requests, rows, hidden]`` after the final norm.
        """
        table = self._model.rotary.covering(rows.positions)
        x = inputs
        for index, layer in enumerate(self._layers):
            x = layer.run(x, table, rows, context, self.pages[index], cache.layer(index))
        hidden: torch.Tensor = self._model.norm(x)
        return hidden


class _ServingLayer:
    """One decoder layer with its weights packed."""

    def __init__(self, layer: DrafterLayer, eps: float):
        self._shape, self._eps, self._scale = (layer.kv_heads, layer.head_dim), eps, layer.head_dim**-0.5
        self._input_norm, self._post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._query_norm, self._key_norm = _weight(layer.q_norm), _weight(layer.k_norm)
        self._qkv, self._o = PackedLinear(layer.qkv_proj.weight), PackedLinear(layer.o_proj.weight)
        self._context_kv = PackedLinear(layer.qkv_proj.weight[layer.q_size :])
        self._gate_up, self._down = PackedLinear(layer.gate_up_proj.weight), PackedLinear(layer.down_proj.weight)

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
            key, value, self._key_norm, self._eps, rotary_table, positions, slot_mapping, pages[:, 0], pages[:, 1]
        )

    def run(
        self,
        x: torch.Tensor,
        rotary_table: torch.Tensor,
        rows: BlockRows,
        context: BlockContext,
        pages: torch.Tensor,
        block: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        query = ops.append_block(
            self._qkv(self._input_norm(x)),
            self._query_norm,
            self._key_norm,
            self._eps,
            rotary_table,
            rows.positions,
            rows.places,
            *block,
        )
        attended = ops.block_attention(
            query, *block, pages[:, 0], pages[:, 1], context.block_tables, context.lengths, rows.visible, self._scale
        )
        x = x + self._o(attended.flatten(2))
        gate, up = self._gate_up(self._post_norm(x)).chunk(2, dim=-1)
        result: torch.Tensor = x + self._down(F.silu(gate) * up)
        return result


def _weight(norm: RMSNorm | None) -> torch.Tensor | None:
    return None if norm is None else norm.weight.detach()
