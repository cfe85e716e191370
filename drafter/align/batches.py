"""From recorded answers to training blocks: anchors, labels and the attention that serving will use."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cuda_ext import reference
from drafter.align.corpus import Answer
from drafter.config import DrafterConfig, InputScheme
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
        observed: ``[A, K]`` bool, draft tokens that the block already holds as inputs, see ``draw_observed``; ``None``
            when no block of the batch holds any.
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
    observed: torch.Tensor | None = None

    def counted(self) -> torch.Tensor:
        """``[A, K]`` bool, labels to learn: within the answer, and not an input of their own block."""
        inside = self.labels >= 0
        # A masked slot sees every observed slot, the one that holds its own draft token included.
        return inside if self.observed is None else inside & ~self.observed

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


def draw_observed(
    labels: torch.Tensor, share: float, config: DrafterConfig, generator: torch.Generator
) -> torch.Tensor | None:
    """Draw which draft tokens are inputs, as a refinement pass finds them.

    A block is chosen with probability ``share``. Of a chosen one the number of observed draft tokens is uniform over
    1 to as many as can be observed, and which they are is uniform again. Those past the end of the answer cannot be,
    nor can the last of the shift scheme: no slot holds it.

    Args:
        labels: ``[A, K]`` int64, negative past the end of the answer.
        share: 0 to 1; with 0 nothing is drawn.

    Returns:
        ``[A, K]`` bool, or ``None`` when ``share`` is 0.
    """
    if share == 0:
        return None
    possible = labels >= 0
    possible[:, config.block_size - 1 :] = False
    blocks, count = labels.shape
    chosen = torch.rand(blocks, generator=generator) < share
    number = 1 + (torch.rand(blocks, generator=generator) * possible.sum(dim=1)).long()
    rank = torch.rand(blocks, count, generator=generator).masked_fill(~possible, 2.0).argsort(dim=1).argsort(dim=1)
    return possible & chosen[:, None] & (rank < number[:, None])


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
    """Hidden states ``[A, K, hidden]`` that predict the draft tokens of all blocks, in their order; differentiable."""
    config = model.config
    slots = config.block_size
    features = model.context_features(batch.hidden_states)
    context = model.context_kv(features, batch.positions)
    attend = _dense_attention(batch, context, config)
    last_features = features[batch.anchors]
    if batch.observed is not None:
        return _run_reordered(model, batch, batch.observed, last_features, embedding, attend)
    inputs = model.block_inputs(batch.anchor_tokens, last_features, embedding, slots)
    positions = batch.anchor_positions[:, None] + torch.arange(slots)
    hidden: torch.Tensor = model(inputs, positions, attend)
    return hidden


def _run_reordered(
    model: BlockDrafter,
    batch: BlockBatch,
    observed: torch.Tensor,
    last_features: torch.Tensor,
    embedding: torch.Tensor,
    attend: Attend,
) -> torch.Tensor:
    """``run_blocks`` with observed slots physically in front, as serving has them in its second pass."""
    slots = model.config.block_size
    # Slot i + 1 holds draft token i in both input schemes.
    held = observed[:, : slots - 1]
    tokens = batch.labels[:, : slots - 1].where(held, model.config.mask_token_id)
    tokens = torch.cat([batch.anchor_tokens[:, None], tokens], dim=1)
    observed_at = F.pad(torch.where(held, 1, 2), (1, 0), value=0).to(torch.int32)
    order, places, positions, _ = reference.partition_block(observed_at, batch.anchor_positions)
    bias = None if model.last_feature_proj is None else model.last_feature_proj(last_features)
    hidden = model(model.slot_inputs(tokens.gather(1, order), order, bias, embedding), positions, attend)
    if model.config.input_scheme is InputScheme.DFLASH:
        # The anchor, which stands first and predicts nothing, has no row among the hidden states.
        places = places[:, 1:] - 1
    predicting: torch.Tensor = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    return predicting


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
