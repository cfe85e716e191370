"""A block computed densely: no pages, no rows left out, attention written out."""

import math
from collections.abc import Sequence

import torch

from drafter.model import BlockDrafter


def dense_block(
    model: BlockDrafter, features: torch.Tensor, tokens: Sequence[int], order: Sequence[int], embedding: torch.Tensor
) -> torch.Tensor:
    """Hidden states of the slots that predict, by logical slot.

    Args:
        features: ``[context, hidden]`` context features.
        tokens: input of every logical slot, the anchor first.
        order: the slots in physical order, which decides what they see if the block is causal.
        embedding: the target's.
    """
    config, context = model.config, len(features)
    keys_values = model.context_kv(features, torch.arange(context))
    slots = range(len(tokens))
    sees = {slot: order[: order.index(slot) + 1] if config.causal else order for slot in slots}

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        keys, values = (
            torch.cat([before, own[0]]).repeat_interleave(config.num_heads // config.num_kv_heads, dim=1)
            for before, own in zip(keys_values[layer], (key, value), strict=True)
        )
        scores = torch.einsum("qhd,khd->hqk", query[0], keys) / math.sqrt(config.head_dim)
        for slot in slots:
            unseen = [context + other for other in slots if other not in sees[slot]]
            scores[:, slot, unseen] = -math.inf
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)[None]

    bias = None if model.last_feature_proj is None else model.last_feature_proj(features[-1:])
    inputs = model.slot_inputs(torch.tensor([list(tokens)]), torch.tensor([list(slots)]), bias, embedding)
    hidden: torch.Tensor = model(inputs, torch.arange(context, context + len(tokens))[None], attend)[0]
    return hidden
