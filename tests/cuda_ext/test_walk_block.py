"""The walk through draft blocks in one call, against the beam search of width 1 that defines it."""

from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from cuda_ext.linear import WeightFormat
from drafter.coupled import Draws
from drafter.head import DraftHead
from drafter.model import MarkovHead
from drafter.ngram import UNKNOWN, HashedNgrams, TextContext
from drafter.packed import PackedMarkovHead
from drafter.path import BeamOptions, BeamSearch
from drafter.types import DraftPath, RandomSampling
from tests.cuda_ext.oracle import threads

pytestmark = pytest.mark.usefixtures("compiled")

VOCAB, DRAFT_VOCAB, RANK = 400, 150, 32
END = 7


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make_head(
    markov: bool = True, cut: bool = True, dtype: torch.dtype = torch.float16, least: float = 0.25
) -> DraftHead:
    """A head whose Markov weights are exact in ``dtype``; ``cut`` to a draft vocabulary in no particular order.

    ``least`` is one of the weights.
    """
    rows = DRAFT_VOCAB if cut else VOCAB
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5))[:rows] if cut else None
    correction = None
    if markov:
        module = MarkovHead(VOCAB, rows, RANK).requires_grad_(False)
        module.previous.weight.copy_(numbers(VOCAB, RANK, seed=1))
        module.logits.weight.copy_((0.4 * numbers(rows, RANK, seed=2)).to(dtype).float())
        module.logits.weight[0, 0] = least
        correction = PackedMarkovHead(module)
    return DraftHead(torch.zeros(rows, 4), ids, correction)


def text(seed: int, length: int) -> np.ndarray:
    """Tokens of which some follow each other again and again."""
    generator = np.random.default_rng(seed)
    phrases = generator.integers(0, VOCAB, (12, 7))
    return phrases[generator.integers(0, 12, length // 7)].reshape(-1)


def make_ngrams(cells: int = 2**12, length: int = 3000, half_life: int = 2**18) -> HashedNgrams:
    model = HashedNgrams(VOCAB, cells, half_life)
    tokens = text(3, length)
    model.observe(tokens[:-2], tokens[1:-1], tokens[2:], np.arange(len(tokens) - 2) % 4 + 1)
    return model


def sampling(block: int) -> RandomSampling:
    return RandomSampling(7 * block - 9, 0.5 + 0.4 * (block % 4), top_p=0.9 if block % 2 else 1.0)


@dataclass(frozen=True)
class Case:
    """Blocks to draft, and what is known of them."""

    head: DraftHead
    ngrams: HashedNgrams | None = None
    blocks: int = 3
    slots: int = 5
    scale: float = 2.0
    known: bool = True
    drawn: bool = False
    ends: tuple[int, ...] = ()
    options: BeamOptions = field(default_factory=lambda: BeamOptions(1))
    seed: int = 0

    @property
    def logits(self) -> torch.Tensor:
        return self.scale * numbers(self.blocks, self.slots, len(self.head.weight), seed=self.seed)

    @property
    def before(self) -> tuple[torch.Tensor, TextContext | None]:
        """The anchors and what stands before them: half of the time what the n-gram model knows."""
        known, half = text(3, 3000), -(-self.blocks // 2)
        before, anchors = known[self.seed :: 41][: self.blocks].copy(), known[self.seed + 9 :: 37][: self.blocks].copy()
        before[::2], anchors[::2] = known[self.seed :][:half], known[self.seed + 1 :][:half]
        before[2::3] = UNKNOWN
        scopes = np.arange(self.blocks) % 6 + UNKNOWN
        return torch.from_numpy(anchors), TextContext(before, scopes) if self.known else None

    @property
    def end_tokens(self) -> list[Set[int]]:
        """Each block's own: none, or some, of which a few are neither likely nor in the draft vocabulary."""
        return [set(self.ends) | {block} if block % 3 else set() for block in range(self.blocks)] if self.ends else []

    @property
    def draws(self) -> Draws | None:
        if not self.drawn:
            return None
        return Draws.of([sampling(block) for block in range(self.blocks)], list(range(40, 40 + self.blocks)))

    def walk(self, logits: torch.Tensor, fixed: torch.Tensor | None = None) -> DraftPath:
        """In one call, unless there is ``fixed``."""
        anchors, context = self.before
        beam = BeamSearch(self.head, self.ngrams, self.options)
        return beam(logits, anchors, fixed, context, self.end_tokens or None, self.draws)

    def check(self, logits: torch.Tensor | None = None) -> DraftPath:
        """The draft in one call, which is the beam search's; that is asked for by fixing no slot at all."""
        logits = self.logits if logits is None else logits
        found, expected = self.walk(logits), self.walk(logits, torch.full(logits.shape[:2], -1))
        assert found.tokens.dtype == torch.int64 and found.probabilities.dtype == torch.float32
        assert torch.equal(found.tokens, expected.tokens)
        # Noise is added to logarithms, whose errors its exponential makes relative ones.
        torch.testing.assert_close(
            found.probabilities, expected.probabilities, rtol=3e-5 if self.drawn else 2e-6, atol=1e-30
        )
        return found


NGRAMS: dict[str, Callable[[], HashedNgrams | None]] = {
    "no n-grams": lambda: None,
    "empty": lambda: HashedNgrams(VOCAB, 2**10),
    "learnt": make_ngrams,
    "overfull": lambda: make_ngrams(cells=64),
    "halved": lambda: make_ngrams(half_life=700),
}


@pytest.mark.parametrize("ngrams", NGRAMS)
@pytest.mark.parametrize("markov", [True, False], ids=["markov", "no markov"])
@pytest.mark.parametrize("cut", [True, False], ids=["draft vocabulary", "whole vocabulary"])
@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_it_drafts_what_the_beam_search_does(ngrams: str, markov: bool, cut: bool, drawn: bool) -> None:
    case = Case(make_head(markov, cut), NGRAMS[ngrams](), drawn=drawn)
    wide = BeamOptions(1, mass=0.99, max_candidates=32)
    single, whole = BeamOptions(1, mass=0.2, max_candidates=1), BeamOptions(1, mass=1.0, max_candidates=10**4)
    for seed, (blocks, scale, options) in enumerate(
        [(1, 2.0, case.options), (8, 0.5, wide), (17, 1.0, case.options), (2, 3.0, single), (2, 0.3, whole)]
    ):
        for ends in ((), (END, 300)):
            for known in (True, False):
                replace(case, blocks=blocks, scale=scale, options=options, ends=ends, known=known, seed=seed).check()


@pytest.mark.parametrize(
    ("dtype", "format"),
    [
        (torch.float32, WeightFormat.FLOAT32),
        (torch.bfloat16, WeightFormat.BFLOAT16),
        (torch.float16, WeightFormat.FLOAT16),
    ],
)
def test_markov_weights_of_any_format(dtype: torch.dtype, format: WeightFormat) -> None:
    head = make_head(dtype=dtype, least=2.0**-30 if dtype is torch.bfloat16 else 0.25)
    assert isinstance(head.markov, PackedMarkovHead) and head.markov.weights is not None
    assert head.markov.weights[1].format is format
    Case(head, make_ngrams(), blocks=5).check()


def test_every_part_of_the_model_shows_in_the_drafts() -> None:
    """Otherwise equal drafts would say little."""
    whole = Case(make_head(), make_ngrams(), blocks=12, ends=(END,))
    drafts = [
        case.check().probabilities.tolist()
        for case in (
            whole,
            replace(whole, head=make_head(markov=False)),
            replace(whole, ngrams=None),
            replace(whole, known=False),
            replace(whole, drawn=True),
            replace(whole, options=BeamOptions(1, mass=0.05)),
        )
    ]
    assert all(one != other for i, one in enumerate(drafts) for other in drafts[:i])
    outside = set(whole.check().tokens.flatten().tolist()) - set(whole.head.token_ids.tolist())  # type: ignore[union-attr]
    assert outside  # what the n-gram model alone proposed


@pytest.mark.parametrize("markov", [True, False], ids=["markov", "no markov"])
def test_behind_an_end_of_text_its_token_is_repeated(markov: bool) -> None:
    case = Case(make_head(markov, cut=False), make_ngrams(), blocks=4, ends=(END,))
    logits = case.logits
    logits[1, 0, END] = logits[2, 2, END] = logits[3, 4, END] = 90
    found = case.check(logits)
    assert found.tokens[1].tolist() == [END] * 5 and found.tokens[2, 2:].tolist() == [END] * 3
    assert found.probabilities[1, 1:].tolist() == [0] * 4 and bool((found.probabilities[3] > 0).all())
    logits[:, 0, END] = 90
    # Block 0 has no end tokens.
    assert case.check(logits).tokens[0, 1:].tolist() != [END] * 4


def test_an_end_of_text_that_was_proposed_already_counts_once() -> None:
    head = make_head(markov=False, cut=False)
    model = HashedNgrams(VOCAB, 2**10)
    model.observe(np.full(3, 4), np.full(3, 5), np.full(3, END), np.full(3, 2))
    for likely in (True, False):
        case = Case(head, model, blocks=2, slots=1, ends=(END,))
        logits = torch.zeros(2, 1, VOCAB)
        logits[:, 0, END if likely else END + 1] = 9
        anchors, context = torch.tensor([5, 5]), TextContext(np.array([4, 4]), np.array([2, 2]))
        beam = BeamSearch(head, model, case.options)
        ends = [{END}, {END, 30}]
        found, expected = (beam(logits, anchors, fixed, context, ends) for fixed in (None, torch.full((2, 1), -1)))
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=2e-6, atol=0)


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_of_equal_candidates_the_first_is_taken(drawn: bool) -> None:
    case = Case(make_head(markov=False, cut=False), drawn=drawn, slots=20)
    found = case.check(torch.zeros(3, 20, VOCAB))
    assert drawn or found.tokens.flatten().tolist() == [0] * 60


def test_where_nothing_can_be_reached_any_more_the_likeliest_token_is_taken() -> None:
    """Products of many small probabilities are zero at last, and all candidates equally good."""
    case = Case(make_head(), make_ngrams(), slots=80, scale=0.01, blocks=4, options=BeamOptions(1, 0.9, 30))
    assert case.check().probabilities.double().cumprod(dim=1)[:, -1].max() < 1e-46


def test_fewer_tokens_than_are_considered() -> None:
    logits = torch.full((3, 5, DRAFT_VOCAB), -torch.inf)
    logits[..., [4, 90]] = torch.tensor([1.0, 2.0])
    for options in (BeamOptions(1), BeamOptions(1, mass=1.0, max_candidates=9)):
        for ngrams in (None, make_ngrams()):
            Case(make_head(markov=False), ngrams, options=options).check(logits)
    whole = Case(make_head(markov=False), options=BeamOptions(1, 1.0, 10**6))
    whole.check()


def test_what_is_no_number_makes_no_other_tokens_than_there_are() -> None:
    case = Case(make_head(), make_ngrams(), blocks=4, ends=(END,), drawn=True)
    logits = case.logits
    logits[1], logits[2, 3], logits[3, :, ::2] = torch.nan, -torch.inf, torch.nan
    tokens = case.walk(logits).tokens
    assert bool(((tokens >= 0) & (tokens < VOCAB)).all())
    assert torch.equal(tokens[0], case.walk(case.logits).tokens[0])


def test_a_history_that_was_forgotten_in_part() -> None:
    """No continuation counts for more than what is left of it."""
    model = HashedNgrams(VOCAB, 2**10)
    model.observe(np.full(9, 4), np.full(9, 5), np.full(9, 60), np.full(9, 2))
    cells, values, *_ = model.memory
    cells[values > 0] -= 7
    head, logits = make_head(markov=False), torch.zeros(1, 2, DRAFT_VOCAB)
    context = TextContext(np.array([4]), np.array([2]))
    beam = BeamSearch(head, model, BeamOptions(1))
    found, expected = (beam(logits, torch.tensor([5]), fixed, context) for fixed in (None, torch.full((1, 2), -1)))
    assert found.tokens[0, 0] == 60 and torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bit", [32, 39, 63])
@torch.inference_mode()
def test_counts_under_other_tags_are_not_taken(bit: int) -> None:
    model = make_ngrams()
    case = Case(make_head(), model, blocks=6)
    known = case.check()
    model.memory[0].bitwise_xor_(torch.tensor(1 << bit if bit < 63 else -(1 << 63)))
    assert not torch.equal(case.check().probabilities, known.probabilities)


def test_text_that_is_observed_later_counts() -> None:
    model = make_ngrams()
    case = Case(make_head(), model, blocks=6)
    first = case.check()
    tokens = text(8, 5000)
    model.observe(tokens[:-2], tokens[1:-1], tokens[2:], np.full(len(tokens) - 2, 3))
    assert not torch.equal(case.check().probabilities, first.probabilities)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_neighbours_and_threads_do_not_matter(count: int, drawn: bool) -> None:
    case = Case(make_head(), make_ngrams(), blocks=17, ends=(END,), drawn=drawn)
    beam = BeamSearch(case.head, case.ngrams, case.options)
    anchors, context = case.before
    assert context is not None
    draws = case.draws
    whole = beam(case.logits, anchors, None, context, case.end_tokens, draws)
    with threads(count):
        for row in range(17):
            part = slice(row, row + 1)
            own = (
                None
                if draws is None
                else Draws(draws.seeds[part], draws.positions[part], draws.temperatures[part], draws.shares[part])
            )
            alone = beam(
                case.logits[part],
                anchors[part],
                None,
                TextContext(context.before[part], context.scopes[part]),
                case.end_tokens[part],
                own,
            )
            assert torch.equal(alone.tokens, whole.tokens[part])
            assert torch.equal(alone.probabilities, whole.probabilities[part])


@pytest.mark.parametrize(("blocks", "slots"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_draft(blocks: int, slots: int) -> None:
    head = make_head()
    context = TextContext(np.zeros(blocks, dtype=np.int64), np.zeros(blocks, dtype=np.int64))
    path = BeamSearch(head, make_ngrams(), BeamOptions(1))(
        torch.zeros(blocks, slots, DRAFT_VOCAB), torch.zeros(blocks, dtype=torch.int64), None, context
    )
    assert path.tokens.shape == path.probabilities.shape == (blocks, slots)


def arguments() -> dict[str, Any]:
    head, model = make_head(), make_ngrams()
    assert isinstance(head.markov, PackedMarkovHead) and head.markov.weights is not None
    previous, packed = head.markov.weights
    ids = head.token_ids
    assert ids is not None
    rows = torch.full((VOCAB + 1,), -1)
    rows[ids] = torch.arange(DRAFT_VOCAB)
    two = torch.zeros(2, dtype=torch.int64)
    return {
        "logits": numbers(2, 3, DRAFT_VOCAB),
        "anchors": two,
        "context": [two, two],
        "ends": torch.full((2, 1), END),
        "vocabulary": [ids, rows],
        "markov": [previous, packed.panels, torch.empty(0)],
        "format": packed.format.value,
        "ngrams": model.memory,
        "text": model.text_mass,
        "draws": [two, two, two.double() + 1, two.double()],
        "count": 5,
        "mass": 0.8,
    }


def test_the_arguments_that_are_spoilt_below_are_right() -> None:
    assert torch.ops.slipstream.walk_block(**arguments())[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("logits", lambda x: x[0], "logits has 2 dimensions, expected 3"),
        ("logits", lambda x: x.double(), "logits has dtype Double, expected Float"),
        ("logits", lambda x: x.transpose(0, 1), "logits has strides"),
        ("logits", lambda x: x[..., :-1].contiguous(), "token_ids has shape \\[150\\], expected \\[149\\]"),
        ("anchors", lambda x: x[:1], "anchors has shape \\[1\\], expected \\[2\\]"),
        ("anchors", lambda x: x.int(), "anchors has dtype Int, expected Long"),
        ("anchors", lambda x: x + VOCAB, "anchors\\[0\\] is 400, expected 0 to 399"),
        ("anchors", lambda x: x - 1, "anchors\\[0\\] is -1, expected 0 to 399"),
        ("context", lambda x: x[:1], "context has 1 tensors, expected 2 or none"),
        ("context", lambda x: [x[0], x[1][:1]], "scopes has shape"),
        ("context", lambda x: [x[0].float(), x[1]], "before has dtype Float"),
        ("ends", lambda x: x[0], "ends has 1 dimensions, expected 2"),
        ("ends", lambda x: x[:1], "ends has shape \\[1, 1\\], expected \\[2, 1\\]"),
        ("ends", lambda x: x + VOCAB, "a candidate is token 407, expected 0 to 399"),
        ("vocabulary", lambda x: x[:1], "vocabulary has 1 tensors"),
        ("vocabulary", lambda x: [x[0], x[1][:0]], "rows is empty"),
        ("vocabulary", lambda x: [x[0] + VOCAB, x[1]], "a candidate is token \\d+, expected 0 to 399"),
        ("vocabulary", lambda x: [-1 - x[0], x[1]], "a candidate is token -\\d+, expected 0 to 399"),
        ("markov", lambda x: x[:2], "markov has 2 tensors, expected 3 or none"),
        ("markov", lambda x: [x[0][0], *x[1:]], "previous has 1 dimensions"),
        ("markov", lambda x: [x[0], x[1][1:], x[2]], "panels has \\d+ bytes, expected"),
        ("markov", lambda x: [*x[:2], torch.ones(160)], "scales is given"),
        ("format", lambda _: "int7", "format is int7"),
        ("ngrams", lambda x: x[:3], "ngrams has 3 tensors, expected 4 or none"),
        ("ngrams", lambda x: [x[0][:3], *x[1:]], "cells has 3 buckets, expected a power of two"),
        ("ngrams", lambda x: [x[0][:0], *x[1:]], "cells has 0 buckets"),
        ("ngrams", lambda x: [x[0][:, :2].contiguous(), *x[1:]], "cells has shape"),
        ("ngrams", lambda x: [x[0], x[1][:2], *x[2:]], "values has shape"),
        ("ngrams", lambda x: [*x[:2], x[2].long(), x[3]], "unigrams has dtype Long"),
        ("ngrams", lambda x: [*x[:2], x[2][:5], x[3]], "expected 0 to 4"),
        ("ngrams", lambda x: [*x[:3], x[3][:2]], "concentrations has shape"),
        ("draws", lambda x: x[:3], "draws has 3 tensors"),
        ("draws", lambda x: [*x[:3], x[3].float()], "shares has dtype Float"),
        ("count", lambda _: 0, "count is 0, expected 1 to 150"),
        ("count", lambda _: 151, "count is 151, expected 1 to 150"),
    ],
)
def test_wrong_arguments_are_named(compiled: ModuleType, name: str, change: Any, message: str) -> None:
    given = arguments()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.slipstream.walk_block(**{**given, name: change(given[name])})
