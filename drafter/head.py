"""Turning the drafter's hidden states into draft tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from drafter.packed import PackedLinear


@dataclass(frozen=True, slots=True)
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

    def walk(self, hidden: torch.Tensor, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pick the most likely token of every slot from left to right.

        Args:
            hidden: ``[blocks, slots, hidden]``.
            anchors: ``[blocks]`` the token before slot 0.

        Returns:
            Token ids and survival estimates, both ``[blocks, slots]``. The survival of a slot is the product of the
            probabilities of the tokens picked up to it, so it never depends on a later slot.
        """
        logits = F.linear(hidden, self.weight) if self.packed is None else self.packed(hidden)
        previous, tokens, survival = anchors, [], []
        reached = torch.ones(len(anchors), dtype=logits.dtype, device=logits.device)
        for slot in range(logits.shape[1]):
            row = logits[:, slot]
            if self.markov is not None:
                row = row + self.markov(previous)
            best, index = row.max(dim=-1)
            reached = reached * (best - row.logsumexp(dim=-1)).exp()
            previous = index if self.token_ids is None else self.token_ids[index]
            tokens.append(previous)
            survival.append(reached)
        return torch.stack(tokens, dim=1), torch.stack(survival, dim=1)
