import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.coupled import Draws
from drafter.head import DraftHead
from drafter.model import MarkovHead
from drafter.ngram import UNKNOWN, HashedNgrams, TextContext
from drafter.packed import PackedMarkovHead
from drafter.path import BeamOptions, BeamSearch, DraftVocabulary, independent
from drafter.types import DraftPath, RandomSampling
from tests.drafter.tiny import HIDDEN, fill

VOCAB, DRAFT_VOCAB, BLOCKS, SLOTS = 12, 7, 3, 4
TOKEN_IDS = torch.tensor([1, 9, 4, 6, 11, 2, 7])
END = 6
EVERYTHING = BeamOptions(width=10**4, mass=1.0, max_candidates=10**4)


def make_head(markov: bool = True, cut: bool = True, seed: int = 0, packed: bool = False) -> DraftHead:
    generator = torch.Generator().manual_seed(seed)
    rows = DRAFT_VOCAB if cut else VOCAB
    correction = MarkovHead(VOCAB, rows, 3) if markov else None
    if correction is not None:
        fill(correction, generator)
        correction.requires_grad_(False)
    bias = PackedMarkovHead(correction) if packed and correction is not None else correction
    return DraftHead(torch.zeros(rows, HIDDEN), TOKEN_IDS if cut else None, bias)


def make_logits(head: DraftHead, seed: int = 1, blocks: int = BLOCKS, scale: float = 1.5) -> torch.Tensor:
    return scale * torch.randn(blocks, SLOTS, len(head.weight), generator=torch.Generator().manual_seed(seed))


def make_ngrams(seed: int = 2) -> HashedNgrams:
    model = HashedNgrams(VOCAB, cells=2**12)
    text = np.random.default_rng(seed).integers(0, VOCAB, 150)
    model.observe(text[:-2], text[1:-1], text[2:], np.arange(148) % 3 + 1)
    return model


ANCHORS = torch.tensor([0, 8, 11])
CONTEXT = TextContext(np.array([3, UNKNOWN, 5]), np.array([1, 2, 9]))
FIXED = torch.tensor([[-1, 4, -1, -1], [-1] * 4, [1, -1, -1, 9]])


@dataclass(frozen=True)
class NaiveSearch:
    """The search in plain Python, one block at a time."""

    head: DraftHead
    ngrams: HashedNgrams | None
    ends: tuple[int, ...]
    options: BeamOptions
    draws: Draws | None = None

    def run(self, logits: torch.Tensor, block: int, held: torch.Tensor | None) -> list["NaivePath"]:
        """All paths that are kept to the end, best first."""
        fixed = [-1] * SLOTS if held is None else held[block].tolist()
        beams = [NaivePath((int(CONTEXT.before[block]), int(ANCHORS[block])), (), 0.0, False)]
        for slot, row in enumerate(logits[block]):
            longer = [path for beam in beams for path in self._extend(beam, row, fixed[slot], block)]
            beams = sorted(longer, key=lambda path: -path.value)[: self.options.width]
        return beams

    def _extend(self, beam: "NaivePath", logits: torch.Tensor, fixed: int, block: int) -> list["NaivePath"]:
        if beam.ended:
            return [beam.longer(beam.tokens[-1] if fixed < 0 else fixed, 0.0, self.ends)]
        drafter = self._drafter(logits, beam.tokens[-1])
        if self.ngrams is None:
            candidates = [fixed] if fixed >= 0 else self._candidates(drafter, [])
            chances = [drafter.get(token, 0.0) for token in candidates]
            return self._longer(beam, candidates, chances, fixed < 0, block)
        pair = (np.array([beam.tokens[-2]]), np.array([beam.tokens[-1]]), CONTEXT.scopes[block : block + 1])
        history = self.ngrams.histories(*pair)
        candidates = [fixed] if fixed >= 0 else self._candidates(drafter, history.successors[0].tolist())
        others = self.ngrams.probability(history, np.array([candidates]))[0].tolist()
        mine = [drafter.get(token, 0.0) for token in candidates]
        pooled = [0.75 * (a + b) - 0.5 * a * b for a, b in zip(mine, others, strict=True)]
        return self._longer(beam, candidates, pooled, fixed < 0, block)

    def _longer(
        self, beam: "NaivePath", candidates: list[int], chances: list[float], free: bool, block: int
    ) -> list["NaivePath"]:
        if self.draws is not None and free:
            slot = len(beam.chances)
            tokens = np.array([[candidates]] * BLOCKS)
            given = np.array([[chances]] * BLOCKS, dtype=np.float32)
            chances = self.draws.agreement(slot, tokens, given, np.ones(given.shape, dtype=np.bool_))[block, 0].tolist()
        return [beam.longer(token, chance, self.ends) for token, chance in zip(candidates, chances, strict=True)]

    def _drafter(self, logits: torch.Tensor, last: int) -> dict[int, float]:
        rows = logits.tolist()
        if self.head.markov is not None:
            rows = [a + b for a, b in zip(rows, self.head.markov(torch.tensor(last)).tolist(), strict=True)]
        total = sum(map(math.exp, rows))
        ids = range(len(rows)) if self.head.token_ids is None else self.head.token_ids.tolist()
        return {token: math.exp(row) / total for token, row in zip(ids, rows, strict=True)}

    def _candidates(self, chances: dict[int, float], successors: list[int]) -> list[int]:
        chosen, mass = list[int](), 0.0
        for token in sorted(chances, key=lambda token: -chances[token])[: self.options.max_candidates]:
            if mass < self.options.mass:
                chosen.append(token)
                mass += chances[token]
        others = [token for token in successors if token != UNKNOWN]
        return list(dict.fromkeys([*chosen, *sorted(self.ends), *others]))


@dataclass(frozen=True)
class NaivePath:
    tokens: tuple[int, ...]
    chances: tuple[float, ...]
    value: float
    ended: bool

    def longer(self, token: int, chance: float, ends: Sequence[int]) -> "NaivePath":
        chances = (*self.chances, chance)
        return NaivePath((*self.tokens, token), chances, self.value + math.prod(chances), self.ended or token in ends)


def value(path: DraftPath, block: int) -> float:
    return float(path.survival[block].sum())


@settings(max_examples=100, deadline=None)
@given(
    markov=st.booleans(),
    packed=st.booleans(),
    cut=st.booleans(),
    learnt=st.booleans(),
    fixed=st.booleans(),
    ends=st.sampled_from([(), (END,), (END, 9)]),
    options=st.builds(
        BeamOptions,
        width=st.integers(1, 4),
        mass=st.sampled_from([0.3, 0.6, 0.8, 0.95]),
        max_candidates=st.integers(1, 15),
    ),
    drawn=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_search_equals_a_naive_one(
    markov: bool,
    packed: bool,
    cut: bool,
    learnt: bool,
    fixed: bool,
    ends: tuple[int, ...],
    options: BeamOptions,
    drawn: bool,
    seed: int,
) -> None:
    head, ngrams = make_head(markov, cut, seed, packed), make_ngrams(seed) if learnt else None
    held = FIXED if fixed else None
    logits = make_logits(head, seed)
    draws = Draws.of([RandomSampling(seed, 1.0), RandomSampling(-9, 0.3), RandomSampling(4, 2.0)], [8, 3, seed])
    path = BeamSearch(head, ngrams, options)(
        logits, ANCHORS, held, CONTEXT, [set(ends)] * BLOCKS, draws if drawn else None
    )
    assert path.tokens.dtype == torch.int64 and path.probabilities.dtype == torch.float32
    for block in range(BLOCKS):
        expected = NaiveSearch(head, ngrams, ends, options, draws if drawn else None).run(logits, block, held)[0]
        assert path.tokens[block].tolist() == list(expected.tokens[2:])
        assert path.probabilities[block].tolist() == pytest.approx(expected.chances, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("markov", [True, False], ids=["markov", "plain"])
@pytest.mark.parametrize("ends", [(), (END,), (END, 9)], ids=["no end", "one end", "two ends"])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all_paths(markov: bool, ends: tuple[int, ...], seed: int) -> None:
    head, ngrams = make_head(markov, seed=seed), make_ngrams(seed)
    logits = make_logits(head, seed)[:, :3]
    path = BeamSearch(head, ngrams, EVERYTHING)(logits, ANCHORS, None, CONTEXT, [set(ends)] * BLOCKS)
    for block in range(BLOCKS):
        every_path = NaiveSearch(head, ngrams, ends, EVERYTHING).run(logits, block, None)
        assert len(every_path) > 4 * DRAFT_VOCAB
        assert value(path, block) == pytest.approx(max(each.value for each in every_path), rel=1e-4)


@pytest.mark.parametrize("cut", [True, False], ids=["draft vocabulary", "whole vocabulary"])
@pytest.mark.parametrize("held", [None, FIXED], ids=["free", "fixed slots"])
def test_a_beam_of_one_without_ngrams_is_the_walk_of_the_head(cut: bool, held: torch.Tensor | None) -> None:
    head = make_head(cut=cut)
    path = BeamSearch(head, options=BeamOptions(1))(make_logits(head), ANCHORS, held)
    walk = head.walk(make_logits(head), ANCHORS, held)
    assert torch.equal(path.tokens, walk.tokens)
    torch.testing.assert_close(path.probabilities, walk.probabilities)


@pytest.mark.parametrize("cut", [True, False], ids=["draft vocabulary", "whole vocabulary"])
@pytest.mark.parametrize("held", [None, FIXED], ids=["free", "fixed slots"])
def test_independent_slots_are_a_walk_without_markov(cut: bool, held: torch.Tensor | None) -> None:
    head = make_head(markov=False, cut=cut)
    path = independent(make_logits(head), ANCHORS, held, DraftVocabulary(head.token_ids))
    walk = head.walk(make_logits(head), ANCHORS, held)
    assert torch.equal(path.tokens, walk.tokens)
    torch.testing.assert_close(path.probabilities, walk.probabilities)


def test_a_block_does_not_depend_on_the_others_of_its_batch() -> None:
    head = make_head()
    search = BeamSearch(head, make_ngrams())
    ends: list[set[int]] = [{END}, set(), {2, 9}]
    logits = make_logits(head)
    together = search.behind(CONTEXT, ends)(logits, ANCHORS, FIXED)
    for block in range(BLOCKS):
        row = slice(block, block + 1)
        context = TextContext(CONTEXT.before[row], CONTEXT.scopes[row])
        alone = search.behind(context, ends[row])(logits[row], ANCHORS[row], FIXED[row])
        assert torch.equal(alone.tokens, together.tokens[row])
        torch.testing.assert_close(alone.probabilities, together.probabilities[row])


def test_equally_good_paths_are_settled_the_same_way_every_time() -> None:
    head = make_head(markov=False)
    logits, search = torch.zeros(2, SLOTS, DRAFT_VOCAB), BeamSearch(head, options=BeamOptions(3, 1.0))
    first = search(logits, ANCHORS[:2], None)
    assert torch.equal(first.tokens, search(logits, ANCHORS[:2], None).tokens)
    assert torch.equal(first.tokens[0], first.tokens[1])
    assert set(first.tokens.flatten().tolist()) <= set(TOKEN_IDS.tolist())


def certain(head: DraftHead, tokens: Sequence[int], margin: float = 8.0) -> torch.Tensor:
    """Logits ``[1, S, rows]`` of a drafter that is nearly sure of ``tokens``."""
    assert head.token_ids is not None
    logits = torch.zeros(1, len(tokens), len(head.weight))
    for slot, token in enumerate(tokens):
        logits[0, slot, head.token_ids.tolist().index(token)] = margin
    return logits


def test_nothing_is_searched_behind_an_end() -> None:
    head = make_head(markov=False)
    path = BeamSearch(head)(certain(head, [4, END, 9, 1]), ANCHORS[:1], None, None, [{END, 5}])
    assert path.tokens.tolist() == [[4, END, END, END]]
    assert path.survival[0].tolist() == pytest.approx([1, 1, 0, 0], abs=0.02)
    on = BeamSearch(head)(certain(head, [4, END, 9, 1]), ANCHORS[:1], None)
    assert on.tokens.tolist() == [[4, END, 9, 1]]


def test_a_fixed_token_behind_an_end_stays() -> None:
    head = make_head(markov=False)
    fixed = torch.tensor([[-1, -1, 9, -1]])
    path = BeamSearch(head)(certain(head, [4, END, 1, 1]), ANCHORS[:1], fixed, None, [{END}])
    assert path.tokens.tolist() == [[4, END, 9, 9]] and path.probabilities[0, 2:].tolist() == [0, 0]


def test_an_end_is_a_candidate_however_unlikely() -> None:
    head, ngrams = make_head(markov=False), HashedNgrams(VOCAB, cells=2**12)
    repeated = np.full(50, 0)
    ngrams.observe(repeated + 3, repeated, repeated + 2)
    ngrams.observe(repeated + 3, repeated, repeated + END)
    ngrams.observe(repeated + 3, repeated, repeated + END)
    ngrams.observe(repeated[:1] + 3, repeated[:1], repeated[:1] + 2)
    options = BeamOptions(1, mass=0.3)
    context, logits = TextContext(np.array([3]), np.array([1])), certain(head, [4], margin=1.2)
    search = BeamSearch(head, ngrams, options)
    assert search(logits, ANCHORS[:1], None, context, [{END}]).tokens.tolist() == [[END]]
    assert search(logits, ANCHORS[:1], None, context, [set()]).tokens.tolist() == [[2]]


def test_what_followed_before_is_drafted_though_the_drafter_cannot_propose_it() -> None:
    head, ngrams = make_head(markov=False), HashedNgrams(VOCAB, cells=2**12)
    text = np.array([8, 3, 10, 5, 8, 3, 10, 5, 8])
    ngrams.observe(text[:-2], text[1:-1], text[2:], np.full(7, 4))
    logits = torch.zeros(1, SLOTS, DRAFT_VOCAB)
    search = BeamSearch(head, ngrams, options=BeamOptions(1))
    path = search(logits, torch.tensor([8]), None, TextContext(np.array([5]), np.array([4])))
    assert path.tokens.tolist() == [[3, 10, 5, 8]] and bool((path.probabilities > 0.25).all())
    again = search(logits, torch.tensor([8]), path.tokens, TextContext(np.array([5]), np.array([4])))
    assert torch.equal(again.tokens, path.tokens)
    torch.testing.assert_close(again.probabilities, path.probabilities)


def test_early_slots_matter_more_than_late_ones() -> None:
    head = make_head(markov=True)
    assert head.markov is not None and isinstance(head.markov, MarkovHead)
    head.markov.previous.weight.zero_()
    head.markov.logits.weight.zero_()
    # 9 is a little less likely than 4, but makes all that follows certain.
    head.markov.previous.weight[[9, 11], 0] = 1.0
    head.markov.logits.weight[4, 0] = 9.0
    logits = torch.full((1, 3, DRAFT_VOCAB), -9.0)
    logits[0, 0, [2, 1]] = torch.tensor([0.0, -0.05])
    logits[0, 1:] = 0.0
    wide, narrow = (
        BeamSearch(head, options=BeamOptions(width))(logits, ANCHORS[:1], None).tokens[0].tolist() for width in (2, 1)
    )
    assert wide == [9, 11, 11] and narrow[0] == 4
    # The same where the n-gram model names the token that the drafter prefers: it must not fill the beam twice.
    ngrams = HashedNgrams(VOCAB, cells=2**12)
    ngrams.observe(np.array([3]), np.array([0]), np.array([4]))
    named = BeamSearch(head, ngrams, BeamOptions(2))
    context = TextContext(np.array([3]), np.array([1]))
    assert named(logits, ANCHORS[:1], None, context).tokens[0].tolist() == [9, 11, 11]
    logits[0, 0, 1] = -1.4
    assert BeamSearch(head, options=BeamOptions(2))(logits, ANCHORS[:1], None).tokens[0, 0] == 4


def test_what_is_no_candidate_wins_by_no_later_slot() -> None:
    head = make_head(cut=False)
    assert head.markov is not None and isinstance(head.markov, MarkovHead)
    head.markov.previous.weight.zero_()
    head.markov.logits.weight.zero_()
    # Token 0 is likely, but not likely enough, and makes all that follow certain.
    head.markov.previous.weight[0, 0] = 1.0
    head.markov.logits.weight[0, 0] = 9.0
    logits = torch.zeros(2, 8, VOCAB)
    logits[:, 0, [5, 0]] = torch.tensor([8.0, 7.9])
    ends: list[set[int]] = [set(), {3}]
    path = BeamSearch(head, None, BeamOptions(3, mass=0.05))(logits, torch.tensor([5, 5]), None, None, ends)
    assert path.tokens[:, 0].tolist() == [5, 5]


def test_without_context_only_shared_text_helps() -> None:
    head, ngrams = make_head(markov=False), HashedNgrams(VOCAB, cells=2**12)
    ngrams.observe(np.array([UNKNOWN, 8]), np.array([8, 3]), np.array([3, 10]))
    path = BeamSearch(head, ngrams, options=BeamOptions(1))(torch.zeros(1, 2, DRAFT_VOCAB), torch.tensor([3]), None)
    assert 10 not in path.tokens.tolist()[0]
    path = BeamSearch(head, ngrams, options=BeamOptions(1))(
        torch.zeros(1, 2, DRAFT_VOCAB), torch.tensor([3]), None, TextContext(np.array([8]), np.array([UNKNOWN]))
    )
    assert path.tokens[0, 0] == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0; expected 1 or more"),
        ({"mass": 0.0}, "mass is 0.0; expected above 0, at most 1"),
        ({"mass": 1.1}, "mass is 1.1"),
        ({"max_candidates": 0}, "max_candidates is 0; expected 1 or more"),
    ],
)
def test_wrong_options_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamOptions(**change)  # type: ignore[arg-type]
