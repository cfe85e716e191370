"""Drafting what the target is about to draw, for requests above temperature 0.

The target draws a token as the arg-max of ``log p / T`` plus Gumbel noise, and that noise is no secret: it depends on
the request's seed, the token's position and its id alone (``drafter.noise``). With the same noise the drafter can
guess the draw itself, where its most likely token is right only if the target happens to draw that one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from drafter.ngram import Tokens
from drafter.noise import noise_of_tokens
from drafter.types import RandomSampling, TargetForward

_Floats = npt.NDArray[np.float32]

# Measured on sampled answers of the default model, where anything from 0.4 to 0.6 does about as well.
_SHARE = 0.5
_LEAST = 1e-30  # stands for a probability of zero, whose logarithm has to be a number


@dataclass(frozen=True, slots=True)
class Draws:
    """What the target's draws behind some anchors depend on, apart from its logits.

    Attributes:
        seeds: ``[B]`` int64.
        positions: ``[B]`` int64, position of the first draft token of each block.
        temperatures: ``[B]`` float64, above 0.
        shares: ``[B]`` float64 from 0 to 1, how much the noise has to say, see ``agreement``.
    """

    seeds: Tokens
    positions: Tokens
    temperatures: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]

    @classmethod
    def behind(cls, forward: TargetForward, rows: Sequence[int]) -> "Draws":
        """The draws behind a pass, of its requests ``rows``, all sampled.

        The last token that was emitted has not been run yet: it stands right behind the context, and the first draft
        token behind that.
        """
        lengths = forward.context_lens.tolist()
        sampling = [each for row in rows if (each := forward.sampling[row]) is not None]
        return cls.of(sampling, [lengths[row] + 1 for row in rows])

    @classmethod
    def of(cls, sampling: Sequence[RandomSampling], positions: Sequence[int]) -> "Draws":
        """The draws of requests whose first draft tokens stand at ``positions``."""
        return cls(
            np.array([each.seed for each in sampling], dtype=np.int64),
            np.array(positions, dtype=np.int64),
            np.array([each.temperature for each in sampling]),
            np.array([_share(each) for each in sampling]),
        )

    def agreement(self, slot: int, tokens: Tokens, chances: _Floats, valid: npt.NDArray[np.bool_]) -> _Floats:
        """The estimated probability that the target draws each candidate, given the noise.

        Either the target's distribution is much like the drafter's: then the noise decides, and the draw is among the
        tokens whose ``log p / T`` plus noise is highest, by a softmax because the drafter errs. (It would be exact if
        every score of the target were the drafter's plus an independent Gumbel error.) Or the target is sure of one
        token and the drafter's distribution only tells which one that may be: then the noise decides nothing. The
        flatter the distribution that the target draws from, the likelier the first (``shares``).

        Args:
            slot: draft slot of all candidates, from 0.
            tokens: ``[B, beams, K]`` int64 target ids.
            chances: ``[B, beams, K]`` their probabilities by the drafter.
            valid: ``[B, beams, K]`` those that take part, at least one of each ``K``.

        Returns:
            ``[B, beams, K]`` float32; for those that take no part, anything.
        """
        blocks, beams, count = tokens.shape
        noise = noise_of_tokens(
            torch.from_numpy(self.seeds).repeat_interleave(beams),
            torch.from_numpy(self.positions + slot).repeat_interleave(beams),
            torch.from_numpy(tokens.reshape(-1, count)),
        )
        temperature = self.temperatures[:, None, None]
        scores = np.log(np.maximum(chances, _LEAST)) / temperature + noise.view(blocks, beams, count).numpy()
        scores[~valid] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        coupled = np.exp(scores)
        coupled /= coupled.sum(axis=-1, keepdims=True)
        share = self.shares[:, None, None]
        result: _Floats = ((1 - share) * chances + share * coupled).astype(np.float32)
        return result


def _share(sampling: RandomSampling) -> float:
    """Grows with the temperature; falls to 0 where so few tokens are left that the target hardly has a choice."""
    others = 1 - 1 / sampling.top_k if sampling.top_k else 1.0
    return min(1.0, _SHARE * sampling.temperature * sampling.top_p * others)
