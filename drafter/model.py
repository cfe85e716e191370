"""The drafter's network: a few decoder layers that read the target's hidden states as extra keys and values."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from cuda_ext.reference import turn
from drafter.config import DrafterConfig, InputScheme


class Attend(Protocol):
    """Attention of the block's queries over context and block; serving reads pages, training reads tensors."""

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend from ``query`` ``[blocks, slots, heads, head_dim]``; ``key`` and ``value`` have ``kv_heads``."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding in half-split layout, from a table that grows on demand."""

    table: torch.Tensor

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self.register_buffer("table", torch.empty(0, 2, head_dim), persistent=False)

    def covering(self, positions: torch.Tensor) -> torch.Tensor:
        """The table ``[at least max(positions) + 1, 2, head_dim]``: cosines, then sines that carry the sign."""
        needed = int(positions.max()) + 1 if positions.numel() else 0
        if needed > len(self.table):
            self.table = self._build(max(needed, 2 * len(self.table), 512)).to(positions.device)
        return self.table

    def factors(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[*positions.shape, 1, head_dim]`` that broadcast over heads."""
        rows = self.covering(positions)[positions]
        return rows[..., :1, :], rows[..., 1:, :]

    def _build(self, length: int) -> torch.Tensor:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angles = torch.arange(length, dtype=torch.float64)[:, None] * self.theta**-exponents
        sines = torch.cat([-angles.sin(), angles.sin()], dim=-1)
        return torch.stack([torch.cat([angles.cos()] * 2, dim=-1), sines], dim=1).to(torch.float32)


def rotate(x: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply rotary ``factors`` (the sines carry the sign) to ``[..., heads, head_dim]``."""
    return turn(x, *factors)


class DrafterLayer(nn.Module):
    """A pre-norm decoder layer; projections that read the same input are one matrix."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_size, self.kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.qkv_proj = nn.Linear(hidden, self.q_size + 2 * self.kv_size, bias=False)
        self.o_proj = nn.Linear(self.q_size, hidden, bias=False)
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def context_kv(
        self, features: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[tokens, kv_heads, head_dim]`` of context features ``[tokens, hidden]``."""
        kv = F.linear(features, self.qkv_proj.weight[self.q_size :])
        key, value = kv.view(*kv.shape[:-1], 2 * self.kv_heads, self.head_dim).chunk(2, dim=-2)
        return rotate(self.k_norm(key) if self.k_norm else key, factors), value

    def forward(
        self, x: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], layer: int, attend: Attend
    ) -> torch.Tensor:
        """``x`` ``[blocks, slots, hidden]`` through attention and MLP."""
        qkv = self.qkv_proj(self.input_layernorm(x))
        heads = qkv.view(*qkv.shape[:-1], -1, self.head_dim)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        attended = attend(layer, rotate(query, factors), rotate(key, factors), value)
        x = x + self.o_proj(attended.reshape(*x.shape[:-1], self.q_size))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        output: torch.Tensor = x + self.down_proj(F.silu(gate) * up)
        return output


class MarkovHead(nn.Module):
    """Low-rank correction of a slot's logits by the token before it (DSpark): ``logits + W1[previous] W2``."""

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int):
        super().__init__()
        self.previous = nn.Embedding(vocab_size, rank)
        self.logits = nn.Linear(rank, draft_vocab_size, bias=False)

    def forward(self, previous: torch.Tensor) -> torch.Tensor:
        """``previous`` ``[...]`` token ids; returns ``[..., draft_vocab]`` to be added to the slot's logits."""
        bias: torch.Tensor = self.logits(self.previous(previous))
        return bias


class BlockDrafter(nn.Module):
    """Fills a block of draft slots in one pass.

    The target's hidden states become context features through one projection and norm, and from them each layer's
    own context keys and values (DFlash's K/V injection). Embedding and output head are the target's and are passed
    in; they are not part of the checkpoint.
    """

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.feature_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(DrafterLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
        shift = config.input_scheme is InputScheme.SHIFT
        self.slot_embedding = nn.Parameter(torch.zeros(config.block_size, config.hidden_size)) if shift else None
        self.last_feature_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) if config.last_feature else None
        )
        self.markov = (
            MarkovHead(config.vocab_size, config.draft_vocab_size, config.markov_rank) if config.markov_rank else None
        )

    def context_features(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project ``[tokens, feature_size]`` concatenated hidden states to ``[tokens, hidden]``."""
        features: torch.Tensor = self.hidden_norm(self.fc(hidden_states))
        return features

    def context_kv(self, features: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every layer's keys and values for context ``features`` ``[tokens, hidden]`` at ``positions`` ``[tokens]``."""
        factors = self.rotary.factors(positions)
        return [layer.context_kv(features, factors) for layer in self.layers]  # type: ignore[operator]

    def block_inputs(
        self, anchors: torch.Tensor, last_features: torch.Tensor, embedding: torch.Tensor, slots: int
    ) -> torch.Tensor:
        """The first ``slots`` inputs of blocks of which only the anchors are known.

        Args:
            anchors: ``[blocks]`` ids of the last emitted tokens, which the target has not run yet.
            last_features: ``[blocks, hidden]`` context features of the tokens before the anchors.
            embedding: the target's ``[vocab, hidden]``.

        Returns:
            ``[blocks, slots, hidden]``.
        """
        tokens = F.pad(anchors[:, None], (0, slots - 1), value=self.config.mask_token_id)
        bias = None if self.last_feature_proj is None else self.last_feature_proj(last_features)
        return self.slot_inputs(tokens, torch.arange(slots, device=anchors.device).expand_as(tokens), bias, embedding)

    def slot_inputs(
        self, tokens: torch.Tensor, slots: torch.Tensor, bias: torch.Tensor | None, embedding: torch.Tensor
    ) -> torch.Tensor:
        """Inputs of any slots of a block.

        Args:
            tokens: ``[blocks, rows]`` int64: the anchor, an observed token or the mask token.
            slots: ``[blocks, rows]`` int64, the logical slot of each row.
            bias: ``[blocks, hidden]`` projected feature of the last verified token, or ``None``.
            embedding: the target's ``[vocab, hidden]``.

        Returns:
            ``[blocks, rows, hidden]``.
        """
        x = F.embedding(tokens, embedding).to(self.norm.weight.dtype)
        if self.slot_embedding is not None:
            x = x + self.slot_embedding[slots]
        return x if bias is None else x + bias[:, None]

    def forward(self, x: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states of the slots that predict, after the final norm.

        Args:
            x: ``[blocks, slots, hidden]`` from ``block_inputs``.
            positions: ``[blocks, slots]`` logical positions.

        Returns:
            ``[blocks, draft tokens, hidden]``; one fewer than the slots in DFlash's scheme.
        """
        factors = self.rotary.factors(positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, factors, index, attend)
        hidden: torch.Tensor = self.norm(x)
        return hidden if self.config.input_scheme is InputScheme.SHIFT else hidden[:, 1:]
