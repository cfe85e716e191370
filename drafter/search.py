"""The path search that the options ask for, and what it has to be told between drafts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from drafter.coupled import Draws
from drafter.head import DraftHead
from drafter.ngram import HashedNgrams, TextStream
from drafter.options import PathSearch, ProposalOptions
from drafter.path import BeamOptions, BeamSearch, DraftVocabulary, independent
from drafter.types import DraftPath, PathSearcher, TargetForward

# A draw may fall on an unlikely token: more of them are considered than where the most likely one is wanted. Twice as
# many were no better at temperatures up to 1, and nor was more than one path.
DRAWN = BeamOptions(width=1, mass=0.99, max_candidates=32)


class DraftSearch(Protocol):
    """Sees every target pass, and picks the drafts behind it."""

    def take(self, *forwards: TargetForward) -> None:
        """Learn what target passes made final."""
        ...

    def behind(self, forward: TargetForward, rows: Sequence[int]) -> PathSearcher:
        """The search for the next blocks of the requests ``rows`` of a pass that was taken, in this order."""
        ...


class _Search(ABC):
    """Searches the most likely tokens of some requests and, if ``coupled``, the draws of those that are sampled."""

    def __init__(self, coupled: bool):
        self._coupled = coupled

    @abstractmethod
    def take(self, *forwards: TargetForward) -> None: ...

    def behind(self, forward: TargetForward, rows: Sequence[int]) -> PathSearcher:
        sampled = [self._coupled and forward.sampling[row] is not None for row in rows]
        if not any(sampled):
            return self._likeliest(forward, rows)
        parts = []
        for kind, search in ((False, self._likeliest), (True, self._drawn)):
            places = [place for place, is_sampled in enumerate(sampled) if is_sampled is kind]
            if places:
                parts.append((places, search(forward, [rows[place] for place in places])))
        return parts[0][1] if len(parts) == 1 else partial(_search_parts, parts)

    @abstractmethod
    def _likeliest(self, forward: TargetForward, rows: Sequence[int]) -> PathSearcher: ...

    @abstractmethod
    def _drawn(self, forward: TargetForward, rows: Sequence[int]) -> PathSearcher: ...


class _Blind(_Search):
    """A search that needs to know no text; ``head`` is the one that it goes by."""

    def __init__(self, searcher: PathSearcher, head: DraftHead, coupled: bool):
        super().__init__(coupled)
        self._searcher = searcher
        self._beam = BeamSearch(head, options=DRAWN)

    def take(self, *forwards: TargetForward) -> None:
        del forwards

    def _likeliest(self, forward: TargetForward, rows: Sequence[int]) -> PathSearcher:
        del forward, rows
        return self._searcher

    def _drawn(self, forward: TargetForward, rows: Sequence[int]) -> PathSearcher:
        return self._beam.behind(None, None, Draws.behind(forward, rows))


class _Beam(_Search):
    """A beam over slots, Markov head and an n-gram model of the text that passes by."""

    def __init__(self, head: DraftHead, vocab_size: int, width: int, coupled: bool):
        super().__init__(coupled)
        ngrams = HashedNgrams(vocab_size)
        self._stream = TextStream(ngrams)
        self._likely_beam = BeamSearch(head, ngrams, BeamOptions(width))
        self._drawn_beam = BeamSearch(head, ngrams, DRAWN)

    def take(self, *forwards: TargetForward) -> None:
        self._stream.take(*forwards)

    def _likeliest(self, forward: TargetForward, rows: Sequence[int]) -> PathSearcher:
        return self._search(self._likely_beam, forward, rows, None)

    def _drawn(self, forward: TargetForward, rows: Sequence[int]) -> PathSearcher:
        return self._search(self._drawn_beam, forward, rows, Draws.behind(forward, rows))

    def _search(
        self, beam: BeamSearch, forward: TargetForward, rows: Sequence[int], draws: Draws | None
    ) -> PathSearcher:
        context = self._stream.context([forward.request_ids[row] for row in rows])
        return beam.behind(context, [forward.end_tokens[row] for row in rows], draws)


def make_search(options: ProposalOptions, head: DraftHead, vocab_size: int) -> DraftSearch:
    """The search of ``options.path``; ``vocab_size`` is the target's."""
    coupled = options.coupled_sampling
    match options.path:
        case PathSearch.WALK:
            return _Blind(head.walk, head, coupled)
        case PathSearch.INDEPENDENT:
            searcher = partial(independent, vocabulary=DraftVocabulary(head.token_ids))
            return _Blind(searcher, replace(head, markov=None), coupled)
        case PathSearch.BEAM:
            return _Beam(head, vocab_size, options.beam_width, coupled)


def _search_parts(
    parts: Sequence[tuple[list[int], PathSearcher]],
    logits: torch.Tensor,
    anchors: torch.Tensor,
    fixed: torch.Tensor | None,
) -> DraftPath:
    """One search for some blocks of a batch, another for the others; each part knows the places of its blocks."""
    path = DraftPath(
        anchors.new_empty(logits.shape[:2]),
        torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device),
    )
    for places, search in parts:
        index = torch.tensor(places, device=logits.device)
        found = search(logits[index], anchors[index], None if fixed is None else fixed[index])
        path.tokens[index], path.probabilities[index] = found.tokens, found.probabilities
    return path
