"""The path search that the options ask for, and what it has to be told between drafts."""

from collections.abc import Sequence, Set
from functools import partial
from typing import Protocol

from drafter.head import DraftHead
from drafter.ngram import HashedNgrams, TextStream
from drafter.options import PathSearch, ProposalOptions
from drafter.path import BeamOptions, BeamSearch, DraftVocabulary, independent
from drafter.types import PathSearcher, TargetForward


class DraftSearch(Protocol):
    """Sees every target pass, and picks the drafts behind it."""

    def take(self, forward: TargetForward) -> None:
        """Learn what a target pass made final."""
        ...

    def behind(self, request_ids: Sequence[str], end_tokens: Sequence[Set[int]]) -> PathSearcher:
        """The search for blocks of these requests, in this order; ``end_tokens`` end their answers."""
        ...


class _Blind:
    """A search that needs to know no text."""

    def __init__(self, searcher: PathSearcher):
        self._searcher = searcher

    def take(self, forward: TargetForward) -> None:
        del forward

    def behind(self, request_ids: Sequence[str], end_tokens: Sequence[Set[int]]) -> PathSearcher:
        del request_ids, end_tokens
        return self._searcher


class _Beam:
    """A beam over slots, Markov head and an n-gram model of the text that passes by."""

    def __init__(self, head: DraftHead, vocab_size: int, width: int):
        ngrams = HashedNgrams(vocab_size)
        self._stream = TextStream(ngrams)
        self._search = BeamSearch(head, ngrams, options=BeamOptions(width=width))

    def take(self, forward: TargetForward) -> None:
        self._stream.take(forward)

    def behind(self, request_ids: Sequence[str], end_tokens: Sequence[Set[int]]) -> PathSearcher:
        return self._search.behind(self._stream.context(request_ids), end_tokens)


def make_search(options: ProposalOptions, head: DraftHead, vocab_size: int) -> DraftSearch:
    """The search of ``options.path``; ``vocab_size`` is the target's."""
    match options.path:
        case PathSearch.WALK:
            return _Blind(head.walk)
        case PathSearch.INDEPENDENT:
            return _Blind(partial(independent, vocabulary=DraftVocabulary(head.token_ids)))
        case PathSearch.BEAM:
            return _Beam(head, vocab_size, options.beam_width)
