"""From recorded answers to training blocks: anchors, labels and the attention that serving will use."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from drafter.align.corpus import Answer
from drafter.config import DrafterConfig
from drafter.model import Attend, BlockDrafter


@dataclass(frozen=True, slots=True)
class BlockBatch:
    """Blocks of several answers, ready for one forward pass.

    ``S`` context rows and ``A`` blocks of ``K`` draft tokens, answer by answer.

    Attributes:
        hidden_states: ``[S, feature_size]`` float32, concatenated target hidden states.
        positions: ``[S]`` int64.
        context_sizes, block_counts: rows and blocks of each answer.
        anchors: ``[A]`` int64, row of the token before each anchor's token, counted over ``S``: its feature is the
            last one that the block may use. The anchor itself is the next row.
        anchor_tokens: ``[A]`` int64.
        anchor_positions: ``[A]`` int64.
        labels: ``[A, K]`` int64 token ids that follow the anchor; -1 past the end of the answer.
        previous: ``[A, K]`` int64, the token before each label.
    """

    hidden_states: torch.Tensor
    positions: torch.Tensor
    context_sizes: list[int]
    block_counts: list[int]
    anchors: torch.Tensor
    anchor_tokens: torch.Tensor
    anchor_positions: torch.Tensor
    labels: torch.Tensor
    previous: torch.Tensor

    def teacher_rows(self) -> torch.Tensor:
        """``[A, K]`` rows over ``S`` whose final hidden state predicts each label; past the end, the last row."""
        rows = self.anchors[:, None] + 1 + torch.arange(self.labels.shape[1])
        return rows.clamp(max=len(self.positions) - 1)


def anchor_range(answer: Answer) -> range:
    """Positions that can be anchors: every answer token but the last, which has nothing after it."""
    return range(answer.prompt_len, len(answer.token_ids) - 1)


def make_batch(answers: Sequence[Answer], anchors: Sequence[torch.Tensor], config: DrafterConfig) -> BlockBatch:
    """Gather blocks at the given anchor positions.

    Args:
        answers: with the hidden states of ``config.hidden_state_layers``.
        anchors: per answer, ``[a]`` int64 positions within ``anchor_range``.
    """
    count = config.num_draft_tokens
    offset, rows, tokens, labels, previous = 0, [], [], [], []
    for answer, positions in zip(answers, anchors, strict=True):
        padded = F.pad(answer.token_ids, (0, count), value=-1)
        following = positions[:, None] + 1 + torch.arange(count)
        labels.append(padded[following])
        previous.append(padded[following - 1].clamp(min=0))
        tokens.append(answer.token_ids[positions])
        rows.append(offset + positions - 1)
        offset += len(answer.token_ids)
    hidden = [torch.cat([a.hidden[i] for i in config.hidden_state_layers], dim=-1) for a in answers]
    return BlockBatch(
        hidden_states=torch.cat(hidden).to(torch.float32),
        positions=torch.cat([torch.arange(len(a.token_ids)) for a in answers]),
        context_sizes=[len(a.token_ids) for a in answers],
        block_counts=[len(p) for p in anchors],
        anchors=torch.cat(rows),
        anchor_tokens=torch.cat(tokens),
        anchor_positions=torch.cat(list(anchors)),
        labels=torch.cat(labels),
        previous=torch.cat(previous),
    )


def block_mask(anchors: torch.Tensor, context_size: int, slots: int, causal: bool) -> torch.Tensor:
    """What the blocks of one answer may attend to.

    Args:
        anchors: ``[a]`` anchor positions.
        context_size: rows of context.

    Returns:
        ``[a * slots, context_size + a * slots]`` bool: the context strictly before the anchor, and the own block.
    """
    count = len(anchors)
    context = (torch.arange(context_size) < anchors[:, None]).repeat_interleave(slots, dim=0)
    inside = torch.ones(slots, slots, dtype=torch.bool)
    blocks = torch.block_diag(*[inside.tril() if causal else inside] * count)
    return torch.cat([context, blocks.bool()], dim=1)


def run_blocks(model: BlockDrafter, batch: BlockBatch, embedding: torch.Tensor) -> torch.Tensor:
    """Hidden states ``[A, K, hidden]`` of all blocks of a batch; differentiable."""
    config = model.config
    slots = config.block_size
    features = model.context_features(batch.hidden_states)
    context = model.context_kv(features, batch.positions)
    inputs = model.block_inputs(batch.anchor_tokens, features[batch.anchors], embedding, slots)
    positions = batch.anchor_positions[:, None] + torch.arange(slots)
    hidden: torch.Tensor = model(inputs, positions, _dense_attention(batch, context, config))
    return hidden


def _dense_attention(
    batch: BlockBatch, context: list[tuple[torch.Tensor, torch.Tensor]], config: DrafterConfig
) -> Attend:
    slots = config.block_size
    anchors = batch.anchor_positions.split(batch.block_counts)
    masks = [
        block_mask(positions, size, slots, config.causal)
        for positions, size in zip(anchors, batch.context_sizes, strict=True)
    ]

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        keys, values = (x.split(batch.context_sizes) for x in context[layer])
        outputs = []
        parts = (x.split(batch.block_counts) for x in (query, key, value))
        for i, (q, k, v) in enumerate(zip(*parts, strict=True)):
            flat_k = torch.cat([keys[i], k.flatten(0, 1)]).transpose(0, 1)[None]
            flat_v = torch.cat([values[i], v.flatten(0, 1)]).transpose(0, 1)[None]
            attended = F.scaled_dot_product_attention(
                q.flatten(0, 1).transpose(0, 1)[None],
                flat_k,
                flat_v,
                attn_mask=masks[i],
                enable_gqa=config.num_heads != config.num_kv_heads,
            )
            outputs.append(attended[0].transpose(0, 1).reshape(q.shape))
        return torch.cat(outputs)

    return attend
