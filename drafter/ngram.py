"""What the text seen so far says about the next token: hashed n-gram counts, learnt while serving.

The drafter fills the slots of a block side by side, so its tokens can contradict each other, and it knows nothing of
phrases that the text repeats. An n-gram model scores a token given the two before it for next to nothing (DiffuSpec's
proxy, arXiv 2510.02358). This one counts twice: over all text, and once more under the request's own scope, because
what a request has said before is the best guide to what it says next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from drafter.types import TargetForward

Tokens = npt.NDArray[np.int64]
_Keys = npt.NDArray[np.uint64]
_Columns = tuple[list[int], list[int], list[int], list[int], list[bool]]

UNKNOWN = -1
"""Stands for a token, or a scope, that nobody saw: n-grams that reach into it count for nothing."""

_WAYS = 4
# Multipliers of the hashes: for the two tokens before (by level), for the order, the scope and the next token.
_PAIRS = np.array([[0, 0xC2B2AE3D27D4EB4F] * 2, [0x165667B19E3779F9] * 4], dtype=np.uint64)
_ORDERS = np.array([0xA0761D6478BD642F, 0] * 2, dtype=np.uint64)
_SCOPE, _NEXT, _MIX = (
    np.array(value, dtype=np.uint64) for value in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xE7037ED1A0B428DB)
)
_HALF, _ONE = np.array(32, dtype=np.uint64), np.array(1, dtype=np.uint64)
_COUNT, _TAG = np.array(2**32 - 1, dtype=np.uint64), np.array(2**64 - 2**32, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class NgramHistories:
    """What the model knows about the pairs of tokens before some slots; ``levels`` are those it interpolates.

    Attributes:
        keys: ``[..., levels]`` hashes.
        totals: ``[..., levels]`` float32, how often each history was continued.
        shares: ``[..., levels]`` float32, what one count adds to a continuation's probability.
        rest: ``[...]`` float32, what is left for the unigram model.
        successors: ``[..., scopes]`` int64, the token that followed the pair last, by scope; ``UNKNOWN`` if none.
    """

    keys: _Keys
    totals: npt.NDArray[np.float32]
    shares: npt.NDArray[np.float32]
    rest: npt.NDArray[np.float32]
    successors: Tokens


@dataclass(frozen=True, slots=True)
class TextContext:
    """What stands before the anchors of some requests.

    Attributes:
        before: ``[R]`` int64, the token before the anchor, ``UNKNOWN`` where nobody saw it.
        scopes: ``[R]`` int64, each request's own.
    """

    before: Tokens
    scopes: Tokens


class HashedNgrams:
    """Trigram model over an unbounded stream of text in fixed memory: 12 bytes a cell, 4 a token of the vocabulary.

    Counts lie in a set-associative table under 64-bit hashes. A full bucket gives up its rarest n-gram for a new one,
    so too small a table forgets but never invents. Every ``half_life`` tokens all counts are halved. Probabilities
    interpolate from uniform over unigrams, shared bigrams and trigrams to the scope's own bigrams and trigrams; each
    level is a Dirichlet posterior with the level below as its mean, so they sum to one while nothing was forgotten,
    and to less afterwards.

    Args:
        vocab_size: token ids are smaller.
        cells: of the table, a power of two.
        half_life: tokens between halvings.
        concentrations: how many observations the level below is worth, for shared bigrams, shared trigrams, own
            bigrams and own trigrams.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        cells: int = 2**20,
        half_life: int = 2**18,
        concentrations: tuple[float, float, float, float] = (30.0, 5.0, 1.0, 1.0),
    ):
        if cells < _WAYS or cells & (cells - 1):
            raise ValueError(f"cells is {cells}; expected a power of two of at least {_WAYS}")
        if not 1 <= half_life <= 2**29:
            raise ValueError(f"half_life is {half_life} tokens; expected 1 to {2**29}, so that counts fit 32 bits")
        if min(concentrations) <= 0:
            raise ValueError(f"concentrations are {concentrations}; expected numbers above 0")
        self.vocab_size = vocab_size
        self._half_life, self._concentrations = half_life, np.array(concentrations, dtype=np.float32)
        self._table = _CountTable(cells // _WAYS)
        self._unigrams = np.zeros(vocab_size, dtype=np.int32)
        self._total = 0
        self._since_halving = 0

    def observe(
        self,
        previous2: Tokens,
        previous1: Tokens,
        tokens: Tokens,
        scopes: Tokens | None = None,
        shared: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Count tokens, each with the two before it.

        Args:
            previous2, previous1, tokens: ``[n]`` int64, in the order in which they were written; the tokens before
                may be ``UNKNOWN``.
            scopes: ``[n]`` int64 from 1, under which the n-grams are counted once more; ``None`` for none.
            shared: ``[n]`` which tokens count outside of their scope; ``None`` for all.
        """
        if not len(tokens):
            return
        public = np.ones(len(tokens), dtype=np.bool_) if shared is None else shared
        histories = _history_keys(previous2, previous1, scopes)
        continuations = _continuation_keys(histories, tokens[:, None])
        known = np.empty(histories.shape, dtype=np.bool_)
        known[:, 0::2] = (previous1 >= 0)[:, None]
        known[:, 1::2] = ((previous1 >= 0) & (previous2 >= 0))[:, None]
        known[:, :2] &= public[:, None]
        successors = np.broadcast_to(tokens[:, None] + 1, histories.shape)[known]
        self._table.add(
            np.concatenate([histories[known], continuations[known]]),
            np.concatenate([successors, np.zeros_like(successors)]).astype(np.int32),
        )
        np.add.at(self._unigrams, tokens[public], 1)
        self._total += int(public.sum())
        self._since_halving += len(tokens)
        while self._since_halving >= self._half_life:
            self._since_halving -= self._half_life
            self._halve()

    def histories(self, previous2: Tokens, previous1: Tokens, scopes: Tokens | None = None) -> NgramHistories:
        """Look up the pairs of tokens before some slots.

        Args:
            previous2, previous1: ``[...]`` int64, or ``UNKNOWN``.
            scopes: ``[...]`` int64; ``None`` for the shared counts alone.
        """
        keys = _history_keys(previous2, previous1, scopes)
        totals, successors = self._table.find(keys)
        prior = self._concentrations[: totals.shape[-1]]
        scale = np.float32(1) / (totals + prior)
        # Every level leaves ``prior * scale`` to the level below it, which all lower levels are multiplied by.
        left = np.multiply.accumulate((prior * scale)[..., ::-1], axis=-1)[..., ::-1]
        shares = (left / prior).astype(np.float32, copy=False)
        return NgramHistories(keys, totals, shares, left[..., 0], successors[..., 1::2].astype(np.int64) - 1)

    def probability(self, histories: NgramHistories, candidates: Tokens) -> npt.NDArray[np.float32]:
        """Probability of each candidate after its history, never zero.

        Args:
            histories: of shape ``[...]``.
            candidates: ``[..., k]`` int64; what stands in for ``UNKNOWN`` is meaningless.

        Returns:
            ``[..., k]`` float32.
        """
        counts = self._table.counts(_continuation_keys(histories.keys[..., None, :], candidates[..., None]))
        # A history may have been forgotten while a continuation of it was not.
        seen = np.minimum(counts, histories.totals[..., None, :])
        frequency = self._unigrams[candidates].astype(np.float32) + np.float32(0.5)
        mass = self.text_mass
        result: npt.NDArray[np.float32] = frequency * (histories.rest[..., None] / np.float32(mass))
        result += (seen @ histories.shares[..., None])[..., 0]
        return result

    @property
    def text_mass(self) -> float:
        """What the counts of all unigrams add up to, each with a half added."""
        return self._total + 0.5 * self.vocab_size

    @cached_property
    def memory(self) -> list[torch.Tensor]:
        """For kernels, the counts themselves, which change as text is observed: cells and values of the table, as
        ``_CountTable.memory`` has them; ``[vocab_size]`` int32 unigrams; ``[levels]`` float32 concentrations."""
        return [*self._table.memory(), torch.from_numpy(self._unigrams), torch.from_numpy(self._concentrations)]

    def _halve(self) -> None:
        self._table.halve()
        self._unigrams >>= 1
        self._total = int(self._unigrams.sum())


class TextStream:
    """Passes the final tokens of every request to an n-gram model, each exactly once, and keeps its last two.

    Prompts count as they are run, answers as they are emitted, drafts only once they are accepted. Tokens that are
    run again after a preemption do not count again. Tokens that are never run, because the prefix cache holds them,
    stay unknown. Private requests count for themselves alone.
    """

    def __init__(self, ngrams: HashedNgrams):
        self._ngrams = ngrams
        self._texts: dict[str, _Text] = {}
        self._scopes = 0

    def take(self, *forwards: TargetForward) -> None:
        """Count what target passes made final, in this order."""
        columns: _Columns = ([], [], [], [], [])
        for forward in forwards:
            self._collect(forward, columns)
        before, last, tokens, scopes, shared = (np.array(column, dtype=np.int64) for column in columns)
        self._ngrams.observe(before, last, tokens, scopes, shared.astype(np.bool_))

    def _collect(self, forward: TargetForward, columns: _Columns) -> None:
        """Append what a pass made final: the two tokens before, the token, its scope, and whether it is shared."""
        for request_id in forward.finished:
            self._texts.pop(request_id, None)
        token_ids, starts = forward.token_ids.cpu().numpy(), forward.row_starts.tolist()
        positions, lengths = forward.positions.cpu().numpy(), forward.context_lens.tolist()
        for r, request_id in enumerate(forward.request_ids):
            start, first = starts[r], int(positions[starts[r]])
            text = self._text(request_id)
            if first > text.counted:
                text.before = text.last = UNKNOWN
                text.counted = first
            run = token_ids[start + text.counted - first : start + lengths[r] - first].tolist()
            if forward.sampled[r] and lengths[r] >= text.counted:
                # The accepted drafts before it are among the tokens that were run.
                run.append(forward.sampled[r][-1])
            known = [text.before, text.last, *run]
            before, last, tokens, scopes, shared = columns
            before.extend(known[:-2])
            last.extend(known[1:-1])
            tokens.extend(run)
            scopes.extend([text.scope] * len(run))
            shared.extend([not forward.private[r]] * len(run))
            text.before, text.last = known[-2:]
            text.counted += len(run)

    def context(self, request_ids: Sequence[str]) -> TextContext:
        """What stands before the last token of requests that are running; raises ``KeyError`` for others."""
        texts = [self._texts[request_id] for request_id in request_ids]
        before, scopes = [text.before for text in texts], [text.scope for text in texts]
        return TextContext(np.array(before, dtype=np.int64), np.array(scopes, dtype=np.int64))

    def _text(self, request_id: str) -> "_Text":
        text = self._texts.get(request_id)
        if text is None:
            self._scopes += 1
            text = self._texts[request_id] = _Text(self._scopes)
        return text


@dataclass(slots=True)
class _Text:
    """A request's text: its last two tokens, and how many of its tokens were counted or cannot be any more."""

    scope: int
    counted: int = 0
    before: int = UNKNOWN
    last: int = UNKNOWN


class _CountTable:
    """Counts by 64-bit key, with a small value beside each: ``buckets`` of ``_WAYS`` cells, found by a 32-bit tag.

    A cell is one word, the tag above the count: cells that hold another tag stay large when the wanted one is
    cancelled, so that the smallest of a bucket is the count. The upper halves of tags and keys are the same.
    """

    def __init__(self, buckets: int):
        self._mask = np.array(buckets - 1, dtype=np.uint64)
        self._cells = np.zeros((buckets, _WAYS), dtype=np.uint64)
        self._values = np.zeros((buckets, _WAYS), dtype=np.int32)

    def counts(self, keys: _Keys) -> npt.NDArray[np.float32]:
        """Counts of ``keys`` ``[...]``, 0 for those that are not there."""
        cells = self._cells.take((keys & self._mask).view(np.int64), axis=0)
        cells ^= (keys & _TAG)[..., None]
        halves = np.minimum(cells[..., :2], cells[..., 2:])
        smallest = np.minimum(halves[..., 0], halves[..., 1])
        counts: npt.NDArray[np.float32] = (smallest * (smallest <= _COUNT)).astype(np.float32)
        return counts

    def find(self, keys: _Keys) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Counts and values of ``keys`` ``[...]``, 0 for those that are not there; slower than ``counts``."""
        buckets, cells, match = self._match(keys)
        counts: npt.NDArray[np.float32] = ((cells & _COUNT) * match).max(axis=-1).astype(np.float32)
        values: npt.NDArray[np.int32] = (self._values.take(buckets, axis=0) * match).max(axis=-1)
        return counts, values

    def add(self, keys: _Keys, values: npt.NDArray[np.int32]) -> None:
        """Count every one of ``keys`` ``[n]``; the value of a key is the last one given."""
        keys, first, amounts = np.unique(keys[::-1], return_index=True, return_counts=True)
        values, counts = values[::-1][first], amounts.astype(np.uint64)
        buckets, _, match = self._match(keys)
        ways, found = match.argmax(axis=1), match.any(axis=1)
        self._cells[buckets[found], ways[found]] += counts[found]
        self._values[buckets[found], ways[found]] = values[found]
        cells = (keys & _TAG) | counts
        new = np.flatnonzero(~found)
        for _ in range(_WAYS):
            if not len(new):
                return
            new = new[self._claim(buckets[new], cells[new], values[new])]

    def halve(self) -> None:
        """Halve every count, downwards; what falls to zero is gone."""
        counts = (self._cells & _COUNT) >> _ONE
        alive = counts > 0
        # In place: kernels read this memory.
        np.multiply((self._cells & _TAG) | counts, alive, out=self._cells)
        self._values *= alive

    def memory(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The table itself, ``[buckets, ways]``: cells as int64, values as int32."""
        return torch.from_numpy(self._cells.view(np.int64)), torch.from_numpy(self._values)

    def _claim(
        self, buckets: npt.NDArray[np.int64], cells: _Keys, values: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.bool_]:
        """Put new cells in place of the rarest of their buckets; returns those that another one displaced at once."""
        # Among equally rare cells the tag decides, so that not every newcomer displaces the one before it.
        turn = (np.arange(_WAYS) + (cells >> _HALF).astype(np.int64)[:, None]) % _WAYS
        ways = ((self._cells[buckets] & _COUNT).astype(np.int64) * _WAYS + turn).argmin(axis=1)
        self._cells[buckets, ways], self._values[buckets, ways] = cells, values
        displaced: npt.NDArray[np.bool_] = self._cells[buckets, ways] != cells
        return displaced

    def _match(self, keys: _Keys) -> tuple[npt.NDArray[np.int64], _Keys, npt.NDArray[np.bool_]]:
        """Buckets ``[...]``, their cells ``[..., _WAYS]``, and which of those hold the keys."""
        buckets = (keys & self._mask).view(np.int64)
        cells = self._cells.take(buckets, axis=0)
        return buckets, cells, (cells ^ keys[..., None]) <= _COUNT


def _history_keys(previous2: Tokens, previous1: Tokens, scopes: Tokens | None) -> _Keys:
    """``[..., levels]``: shared bigram and trigram histories, then those of the scope."""
    pairs = np.stack([previous2, previous1], axis=-1).astype(np.uint64)
    keys = pairs @ _PAIRS + _ORDERS
    if scopes is None:
        return _mixed(keys[..., :2])
    keys[..., 2:] += (scopes.astype(np.uint64) * _SCOPE)[..., None]
    return _mixed(keys)


def _continuation_keys(histories: _Keys, tokens: Tokens) -> _Keys:
    """Hashes of histories ``[..., levels]`` followed by tokens ``[..., 1]``.

    Histories are mixed already: a sum spreads their continuations evenly and keeps those of one history apart.
    """
    return histories + (tokens + 1).astype(np.uint64) * _NEXT


def _mixed(keys: _Keys) -> _Keys:
    keys = (keys ^ (keys >> _HALF)) * _MIX
    return keys ^ (keys >> _HALF)
