"""Picking a draft from the distributions of a block: every slot alone, or the path that should get furthest.

A block's slots are predicted side by side, each without knowing what the others hold. DiffuSpec (arXiv 2510.02358)
therefore searches a causally consistent path through the likely tokens of all slots with the help of an n-gram model.
``BeamSearch`` does so with two differences, both measured on the answers of the default model. Drafter and n-gram
model are pooled as probabilities, not as log-probabilities, so that a phrase that only one of them knows can be
drafted. And paths compete by the number of tokens that will be accepted on expectation, not by the probability that
all will be: verification stops at the first wrong token, so early slots matter more than late ones.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch

from cuda_ext import ops
from drafter.coupled import Draws
from drafter.head import DraftHead
from drafter.ngram import UNKNOWN, HashedNgrams, NgramHistories, TextContext, Tokens
from drafter.types import DraftPath, PathSearcher
from drafter.walk import one_call_walk

_Floats = npt.NDArray[np.float32]
_Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class BeamOptions:
    """How a beam search goes about it.

    Attributes:
        width: paths that are kept from slot to slot.
        mass: per slot, the smallest set of tokens that the drafter gives at least this probability is considered.
        max_candidates: the most tokens of that set.
    """

    width: int = 3
    mass: float = 0.8
    max_candidates: int = 15

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("width", self.width >= 1, "1 or more"),
            ("mass", 0 < self.mass <= 1, "above 0, at most 1"),
            ("max_candidates", self.max_candidates >= 1, "1 or more"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}")


class DraftVocabulary:
    """Between rows of the draft head and target token ids; ``token_ids`` ``[draft_vocab]``, or ``None`` if the same."""

    def __init__(self, token_ids: torch.Tensor | None):
        self._token_ids = None if token_ids is None else token_ids.cpu().numpy()
        if self._token_ids is not None:
            self._rows = np.full(int(self._token_ids.max()) + 2, UNKNOWN, dtype=np.int64)
            self._rows[self._token_ids] = np.arange(len(self._token_ids))

    @property
    def tables(self) -> list[torch.Tensor]:
        """Target ids by row and rows by target id, the last ``UNKNOWN``; nothing if they are the same."""
        return [] if self._token_ids is None else [torch.from_numpy(self._token_ids), torch.from_numpy(self._rows)]

    def tokens(self, rows: Tokens) -> Tokens:
        """Target ids of ``rows`` of any shape."""
        tokens: Tokens = rows if self._token_ids is None else self._token_ids[rows]
        return tokens

    def rows(self, tokens: Tokens) -> Tokens:
        """Rows of target ids of any shape; ``UNKNOWN`` for those that the drafter cannot propose."""
        rows: Tokens = tokens if self._token_ids is None else self._rows[np.minimum(tokens, len(self._rows) - 1)]
        return rows


@torch.inference_mode()
def independent(
    logits: torch.Tensor, anchors: torch.Tensor, fixed: torch.Tensor | None, vocabulary: DraftVocabulary
) -> DraftPath:
    """Every slot's most likely token, whatever the others hold: what a block drafter does without any search.

    Args:
        logits: ``[B, S, draft_vocab]`` float.
        anchors: ``[B]`` int64; unused.
        fixed: ``[B, S]`` int64 target ids that the draft must hold, -1 where it is free; ``None`` for none.
        vocabulary: of the logits.
    """
    del anchors
    blocks, slots, vocab = logits.shape
    drafter = _Distributions.of(logits.reshape(blocks * slots, vocab), None, 1)
    tokens = vocabulary.tokens(drafter.likely.reshape(blocks, slots))
    chances = drafter.chances.reshape(blocks, slots)
    if fixed is not None:
        held = fixed.cpu().numpy()
        tokens = np.where(held >= 0, held, tokens)
        held_chances = drafter.chances_of(vocabulary.rows(held.reshape(-1, 1, 1))).reshape(blocks, slots)
        chances = np.where(held >= 0, held_chances, chances)
    return _draft_path(tokens, chances, logits.device)


@dataclass(frozen=True, slots=True)
class _Distributions:
    """What the drafter says of one slot of every block, behind one or several beams.

    Attributes:
        likely: ``[B, n, K]`` int64 rows of the draft head, likeliest first.
        chances: ``[B, n, K]`` float32, theirs.
        logits: ``[B, draft_vocab]`` float32.
        bias: ``[B, n, draft_vocab]`` float32 that is added to them behind each beam, or ``None``.
        log_sums: ``[B, n]`` float32 logarithms of the sums of exponentials.
    """

    likely: Tokens
    chances: _Floats
    logits: _Floats
    bias: _Floats | None
    log_sums: _Floats

    @classmethod
    def of(cls, logits: torch.Tensor, bias: torch.Tensor | None, count: int) -> "_Distributions":
        """From ``[B, draft_vocab]`` logits and ``[B, n, draft_vocab]`` bias, with at most ``count`` likely tokens."""
        logits = logits.contiguous()
        chances, likely, log_sums = ops.likely_tokens(logits, bias, min(count, logits.shape[1]))
        given = None if bias is None else bias.cpu().numpy()
        return cls(likely.cpu().numpy(), chances.cpu().numpy(), logits.cpu().numpy(), given, log_sums.cpu().numpy())

    def chances_of(self, rows: Tokens) -> _Floats:
        """Probabilities of ``rows`` ``[B, n, k]`` of the draft head; 0 for ``UNKNOWN``."""
        index = np.maximum(rows, 0)
        block = np.arange(len(rows))[:, None, None]
        scores = self.logits[block, index] - self.log_sums[..., None]
        if self.bias is not None:
            scores += self.bias[block, np.arange(rows.shape[1])[:, None], index]
        chances: _Floats = np.exp(scores) * (rows >= 0)
        return chances


class BeamSearch:
    """The path through a block with the most tokens accepted on expectation, by beam search.

    The probability of a token is the drafter's given the token before it (with the Markov head where there is one),
    pooled with the n-gram model's given the two before it. Candidates of a slot are the drafter's likely tokens, the
    end-of-text tokens, and those that followed the same two tokens before, whether or not the drafter can propose
    them. A path ends with an end-of-text token.

    The probability reported with each token is the pooled one, which tells accepted tokens from rejected ones far
    better than the drafter's own: that does not know why the token was picked. Without an n-gram model it is the
    drafter's own. With a width above 1, later slots have a say in which path wins; each token's probability still
    rests on those before it alone. For requests that are sampled it is the estimated probability that the target draws
    the token (``Draws.agreement``).

    Args:
        head: for its Markov correction and vocabulary.
        ngrams: the text seen so far, or ``None`` to go by the drafter alone.
        options: see ``BeamOptions``.
    """

    def __init__(self, head: DraftHead, ngrams: HashedNgrams | None = None, options: BeamOptions | None = None):
        self._options = options = options or BeamOptions()
        self._vocabulary, self._markov, self._ngrams = DraftVocabulary(head.token_ids), head.markov, ngrams
        tables = self._vocabulary.tables
        self._walk = None
        if options.width == 1:
            self._walk = one_call_walk(head, tables, ngrams, options.max_candidates, options.mass)

    def behind(
        self, context: TextContext | None, end_tokens: Sequence[Set[int]] | None, draws: Draws | None = None
    ) -> PathSearcher:
        """This search for blocks of known requests; for the arguments see ``__call__``."""
        return partial(self, context=context, end_tokens=end_tokens, draws=draws)

    @torch.inference_mode()
    def __call__(
        self,
        logits: torch.Tensor,
        anchors: torch.Tensor,
        fixed: torch.Tensor | None,
        context: TextContext | None = None,
        end_tokens: Sequence[Set[int]] | None = None,
        draws: Draws | None = None,
    ) -> DraftPath:
        """Pick a token for every slot.

        Args:
            logits: ``[B, S, draft_vocab]`` float, without the Markov correction.
            anchors: ``[B]`` int64, the token before each draft.
            fixed: ``[B, S]`` int64 target ids that the draft must hold, -1 where it is free; ``None`` for none.
            context: what stands before the anchors; unknown if ``None``.
            end_tokens: per block, the tokens that end its text; ``None`` if paths go on behind any token.
            draws: what the target will draw the tokens with, of blocks that are all sampled; ``None`` if none is.

        Returns:
            Behind an end-of-text token, free slots repeat the token before them, with probability 0.
        """
        ends = _end_table(end_tokens or [set()] * len(anchors))
        if self._walk is not None and fixed is None:
            return self._walk(logits, anchors, context, ends, draws)
        held = None if fixed is None else fixed.cpu().numpy()
        beams = _Beams.start(anchors.cpu().numpy(), context, ends, logits.shape[1])
        for slot in range(logits.shape[1]):
            candidates = self._candidates(logits[:, slot], beams, None if held is None else held[:, slot])
            if draws is not None:
                candidates = candidates.drawn(draws, slot)
            beams = beams.extend(candidates, self._options.width)
        return _draft_path(beams.tokens[:, 0, 2:], beams.probabilities[:, 0], logits.device)

    def _candidates(self, logits: torch.Tensor, beams: "_Beams", held: Tokens | None) -> "_Candidates":
        """The tokens that may follow every beam; ``logits`` ``[B, draft_vocab]``, ``held`` ``[B]``."""
        bias = None if self._markov is None else self._markov(torch.from_numpy(beams.last).to(logits.device))
        drafter = _Distributions.of(logits, bias, self._options.max_candidates)
        tokens, chances, valid = self._likely(drafter, beams.last.shape[1])
        histories = None
        if self._ngrams is not None:
            histories = self._ngrams.histories(beams.before, beams.last, beams.scopes)
        extra = _extra(beams, histories)
        valid = np.concatenate([valid, _first_of_their_kind(extra, tokens, valid)], axis=-1)
        # What is no token is not valid, but has to have a probability.
        extra = np.maximum(extra, 0)
        tokens = np.concatenate([tokens, extra], axis=-1)
        chances = np.concatenate([chances, drafter.chances_of(self._vocabulary.rows(extra))], axis=-1)
        if held is not None and (fixed := held >= 0).any():
            tokens[fixed, :, 0] = held[fixed, None]
            chances[fixed, :, 0] = drafter.chances_of(self._vocabulary.rows(tokens[..., :1]))[fixed, :, 0]
            valid[fixed] = np.arange(valid.shape[-1]) == 0
        if self._ngrams is not None and histories is not None:
            chances = _pooled(chances, self._ngrams.probability(histories, tokens))
        return _Candidates(tokens, chances, valid, None if held is None else held >= 0)

    def _likely(self, drafter: _Distributions, beams: int) -> tuple[Tokens, _Floats, _Flags]:
        """The drafter's likely tokens, most likely first, as far as any beam needs them; which are in the top set."""
        valid = drafter.chances.cumsum(axis=-1) - drafter.chances < self._options.mass
        widest = int(valid.sum(axis=-1).max(initial=1))
        shape = (len(valid), beams, widest)
        tokens = np.broadcast_to(self._vocabulary.tokens(drafter.likely[..., :widest]), shape)
        return (
            tokens,
            np.broadcast_to(drafter.chances[..., :widest], shape),
            np.broadcast_to(valid[..., :widest], shape),
        )


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Continuations of every beam, ``[B, beams, K]``; the first one of a block whose slot is fixed is that token.

    Attributes:
        tokens: int64 target ids.
        probabilities: float32, given the beam.
        valid: those that take part.
        fixed: ``[B]`` whether the slot is; ``None`` if none is.
    """

    tokens: Tokens
    probabilities: _Floats
    valid: _Flags
    fixed: _Flags | None

    def drawn(self, draws: Draws, slot: int) -> "_Candidates":
        """The same with the probability that the target draws each; where the slot is fixed there is no choice."""
        chances = draws.agreement(slot, self.tokens, self.probabilities, self.valid)
        if self.fixed is not None:
            chances = np.where(self.fixed[:, None, None], self.probabilities, chances)
        return replace(self, probabilities=chances)


@dataclass(frozen=True, slots=True)
class _Beams:
    """Paths through the first slots, ``[B, beams]``, best first.

    Attributes:
        tokens: ``[B, beams, 2 + S]`` int64, the two tokens before the block, then the path.
        probabilities: ``[B, beams, S]`` float32.
        values: ``[B, beams]`` float32, tokens accepted on expectation; minus infinity where there are fewer paths.
        reach: ``[B, beams]`` float32, the probability that the whole path is accepted; 0 once it has ended.
        ended: ``[B, beams]`` whether it holds an end-of-text token.
        scopes: ``[B, 1]`` int64, or ``None``.
        ends: ``[B, 1, E]`` int64 end-of-text tokens, ``UNKNOWN`` for none.
        slot: how many slots are filled.
    """

    tokens: Tokens
    probabilities: _Floats
    values: _Floats
    reach: _Floats
    ended: _Flags
    scopes: Tokens | None
    ends: Tokens
    slot: int

    @classmethod
    def start(cls, anchors: Tokens, context: TextContext | None, ends: Tokens, slots: int) -> "_Beams":
        """One empty path for each of ``anchors`` ``[B]``."""
        blocks = len(anchors)
        tokens = np.full((blocks, 1, 2 + slots), UNKNOWN, dtype=np.int64)
        tokens[:, 0, 1] = anchors
        if context is not None:
            tokens[:, 0, 0] = context.before
        return cls(
            tokens,
            np.zeros((blocks, 1, slots), dtype=np.float32),
            np.zeros((blocks, 1), dtype=np.float32),
            np.ones((blocks, 1), dtype=np.float32),
            np.zeros((blocks, 1), dtype=np.bool_),
            None if context is None else context.scopes[:, None],
            ends[:, None],
            0,
        )

    @property
    def before(self) -> Tokens:
        """``[B, beams]`` the last token but one."""
        return self.tokens[..., self.slot]

    @property
    def last(self) -> Tokens:
        """``[B, beams]`` the last token."""
        return self.tokens[..., self.slot + 1]

    def extend(self, candidates: _Candidates, width: int) -> "_Beams":
        """The ``width`` best paths that are one token longer; equal ones in the order of beams and candidates."""
        tokens, chances, valid = candidates.tokens, candidates.probabilities, candidates.valid
        if self.ended.any():
            chances = np.where(self.ended[..., None], np.float32(0), chances)
            valid = np.where(self.ended[..., None], np.arange(valid.shape[-1]) == 0, valid)
            repeated = self.ended if candidates.fixed is None else self.ended & ~candidates.fixed[:, None]
            tokens[..., 0] = np.where(repeated, self.last, tokens[..., 0])
        blocks, count = tokens.shape[0], tokens.shape[-1]
        reach = self.reach[..., None] * chances
        values = np.where(valid, self.values[..., None] + reach, np.float32(-np.inf))
        flat = values.reshape(blocks, -1)
        picked = np.argsort(-flat, axis=1, kind="stable")[:, :width]
        block = np.arange(blocks)[:, None]
        parents = picked // count
        paths, probabilities = self.tokens[block, parents], self.probabilities[block, parents]
        paths[..., self.slot + 2] = chosen = tokens.reshape(blocks, -1)[block, picked]
        probabilities[..., self.slot] = chances.reshape(blocks, -1)[block, picked]
        return _Beams(
            paths,
            probabilities,
            flat[block, picked],
            reach.reshape(blocks, -1)[block, picked],
            self.ended[block, parents] | (chosen[..., None] == self.ends).any(axis=-1),
            self.scopes,
            self.ends,
            self.slot + 1,
        )


def _end_table(end_tokens: Sequence[Set[int]]) -> Tokens:
    """``[B, E]``, every request's own, padded with ``UNKNOWN``."""
    width = max(map(len, end_tokens), default=0)
    rows = [[*sorted(tokens), *[UNKNOWN] * (width - len(tokens))] for tokens in end_tokens]
    return np.array(rows, dtype=np.int64).reshape(len(rows), width)


def _extra(beams: _Beams, histories: NgramHistories | None) -> Tokens:
    """``[B, beams, E]`` candidates apart from the likely ones; ``UNKNOWN`` where there is none."""
    if histories is None:
        return np.broadcast_to(beams.ends, (*beams.last.shape, beams.ends.shape[-1]))
    count = beams.ends.shape[-1]
    extra = np.empty((*beams.last.shape, count + histories.successors.shape[-1]), dtype=np.int64)
    extra[..., :count] = beams.ends
    extra[..., count:] = histories.successors
    return extra


def _pooled(drafter: _Floats, ngrams: _Floats) -> _Floats:
    """The probability of tokens by two models that partly know the same.

    If they knew the same, their average would be right; if each erred on its own, the probability that either is
    right. Measured, the first is too low by about as much as the second is too high: this is the middle.
    """
    half = np.float32(0.5)
    average, either = half * (drafter + ngrams), drafter + ngrams - drafter * ngrams
    return half * (average + either)


def _first_of_their_kind(extra: Tokens, tokens: Tokens, valid: _Flags) -> _Flags:
    """Which of ``extra`` ``[B, beams, E]`` are tokens, and neither among the valid ``tokens`` nor repeated."""
    listed = (extra[..., None] == tokens[..., None, :]) & valid[..., None, :]
    repeated = (extra[..., None] == extra[..., None, :]) & _earlier(extra.shape[-1])
    result: _Flags = (extra >= 0) & ~listed.any(axis=-1) & ~repeated.any(axis=-1)
    return result


@cache
def _earlier(count: int) -> _Flags:
    return np.tri(count, k=-1, dtype=np.bool_)


def _draft_path(tokens: Tokens, probabilities: _Floats, device: torch.device) -> DraftPath:
    return DraftPath(*(torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (tokens, probabilities)))
