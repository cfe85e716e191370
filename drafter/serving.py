"""The drafter's network as serving runs it: packed weights, paged context, the operators of ``cuda_ext``.

``drafter.model`` is the same network for training, in differentiable PyTorch; tests hold the two together.
"""

import torch

from drafter.checkpoint import Drafter
from drafter.head import DraftHead
from drafter.layers import BlockContext, BlockRows, serving_layer
from drafter.packed import PackedLinear, PackedMarkovHead
from drafter.types import PagedCacheSpec, TargetModel


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
        self._model, self._embedding, self.target_dtype = model, target.embedding, target.embedding.dtype
        head = drafter.head(target)
        markov = None if model.markov is None else PackedMarkovHead(model.markov)
        # Rounding the target's rows changes a draft now and then, and never an answer.
        packed = PackedLinear(head.weight, lossy=True)
        self.head = DraftHead(head.weight, head.token_ids, markov, packed)
        self._fc = PackedLinear(model.fc.weight)
        self._last_feature = PackedLinear(model.last_feature_proj.weight) if model.last_feature_proj else None
        self._layers = [serving_layer(layer, config.rms_norm_eps) for layer in model.layers]  # type: ignore[arg-type]
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
        x, residual = inputs, None
        for index, layer in enumerate(self._layers):
            x, residual = layer.run(x, residual, table, rows, context, self.pages[index], cache.layer(index))
        hidden: torch.Tensor = self._model.norm(x if residual is None else x + residual)
        return hidden
