"""A beam search of width 1 through blocks on the CPU: one call of our kernel in place of a dozen operators a slot.

What it computes is what ``drafter.path.BeamSearch`` does. Tokens are the same and probabilities the same up to
rounding: exponentials and logarithms are another library's. Blocks of which tokens are fixed are left to that.
"""

from dataclasses import dataclass

import torch

from cuda_ext import ops
from drafter.coupled import Draws
from drafter.head import DraftHead
from drafter.ngram import HashedNgrams, TextContext, Tokens
from drafter.packed import PackedMarkovHead
from drafter.types import DraftPath


@dataclass(frozen=True, slots=True)
class OneCallWalk:
    """Picks a token for every slot from left to right.

    Attributes:
        vocabulary: ``[draft_vocab]`` int64 target ids of the draft head's rows and, the other way round, rows by target
            id, -1 where there is none and for all ids from the last one on; nothing if ids and rows are the same.
        markov: of the Markov head, ``[vocab, rank]`` float32 rows by token, and panels and scales (empty for none) of
            the packed weight ``[draft_vocab, rank]``; nothing if there is no such head.
        format: of that weight.
        ngrams: the text seen so far, or ``None``.
        count: likely tokens that are considered in each slot, at most.
        mass: probability that they reach together, at most.
    """

    vocabulary: list[torch.Tensor]
    markov: list[torch.Tensor]
    format: str
    ngrams: HashedNgrams | None
    count: int
    mass: float

    def __call__(
        self,
        logits: torch.Tensor,
        anchors: torch.Tensor,
        context: TextContext | None,
        ends: Tokens,
        draws: Draws | None,
    ) -> DraftPath:
        """Draft; for the arguments see ``BeamSearch``.

        Args:
            logits: ``[B, S, draft_vocab]`` float32.
            anchors: ``[B]`` int64.
            context: what stands before the anchors, or ``None``.
            ends: ``[B, E]`` int64 tokens that end each text, padded with -1.
            draws: what the target will draw the tokens with, or ``None``.

        Raises:
            RuntimeError: an argument has a wrong shape or type, or a token is not in the target's vocabulary.
        """
        before = [] if context is None else [context.before, context.scopes]
        drawn = [] if draws is None else [draws.seeds, draws.positions, draws.temperatures, draws.shares]
        tokens, probabilities = torch.ops.slipstream.walk_block.default(
            logits.contiguous(),
            anchors,
            [torch.from_numpy(array) for array in before],
            torch.from_numpy(ends),
            self.vocabulary,
            self.markov,
            self.format,
            [] if self.ngrams is None else self.ngrams.memory,
            0.0 if self.ngrams is None else self.ngrams.text_mass,
            [torch.from_numpy(array) for array in drawn],
            min(self.count, logits.shape[2]),
            self.mass,
        )
        return DraftPath(tokens, probabilities)


def one_call_walk(
    head: DraftHead, vocabulary: list[torch.Tensor], ngrams: HashedNgrams | None, count: int, mass: float
) -> OneCallWalk | None:
    """The walk behind ``head``, or ``None`` where our kernels do not run all of it; the rest is ``OneCallWalk``'s."""
    if not ops.kernels().cpu_compiled or head.weight.device.type != "cpu" or head.weight.dtype != torch.float32:
        return None
    if head.markov is None:
        return OneCallWalk(vocabulary, [], "float32", ngrams, count, mass)
    weights = head.markov.weights if isinstance(head.markov, PackedMarkovHead) else None
    if weights is None:
        return None
    previous, packed = weights
    scales = torch.empty(0) if packed.scales is None else packed.scales
    return OneCallWalk(vocabulary, [previous, packed.panels, scales], packed.format.value, ngrams, count, mass)
