"""Turning the drafter's hidden states into draft tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from drafter.packed import PackedLinear
from drafter.types import DraftPath


@dataclass(frozen=True)
class DraftHead:
    """The target's output head cut to the draft vocabulary, with the optional Markov correction.

    Attributes:
        weight: ``[draft_vocab, hidden]`` rows of the target's output head.
        token_ids: ``[draft_vocab]`` int64 target ids of those rows, or ``None`` when all rows are kept.
        markov: corrects a slot by the token before it, or ``None``.
        packed: ``weight`` packed for serving, or ``None``.
    """

    weight: torch.Tensor
    token_ids: torch.Tensor | None
    markov: Callable[[torch.Tensor], torch.Tensor] | None
    packed: PackedLinear | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., draft_vocab]`` of hidden states ``[..., hidden]``, without the Markov correction."""
        return F.linear(hidden, self.weight) if self.packed is None else self.packed(hidden)

    def walk(self, logits: torch.Tensor, anchors: torch.Tensor, fixed: torch.Tensor | None = None) -> DraftPath:
        """Pick the most likely token of every draft slot from left to right, each given the one before it.

        Args:
            logits: ``[B, S, draft_vocab]``.
            anchors: ``[B]`` int64, the token before each draft.
            fixed: ``[B, S]`` int64 tokens of the draft vocabulary that the draft must hold, -1 where it is free.
        """
        previous, tokens, probabilities = anchors, [], []
        for slot in range(logits.shape[1]):
            row = logits[:, slot]
            if self.markov is not None:
                row = row + self.markov(previous)
            score, index = row.max(dim=-1)
            if fixed is not None:
                held = self.rows_of(fixed[:, slot].clamp(min=0))
                index = torch.where(fixed[:, slot] >= 0, held, index)
                score = row.gather(1, index[:, None])[:, 0]
            probabilities.append((score - row.logsumexp(dim=-1)).exp())
            previous = index if self.token_ids is None else self.token_ids[index]
            tokens.append(previous)
        return DraftPath(torch.stack(tokens, dim=1), torch.stack(probabilities, dim=1))

    def rows_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the head, any shape int64, that belong to ``tokens`` of the draft vocabulary."""
        return tokens if self.token_ids is None else self._row_of_token[tokens]

    @cached_property
    def _row_of_token(self) -> torch.Tensor:
        assert self.token_ids is not None
        rows = self.token_ids.new_zeros(int(self.token_ids.max()) + 1)
        rows[self.token_ids] = torch.arange(len(self.token_ids), device=rows.device)
        return rows
