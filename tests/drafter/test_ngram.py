from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.ngram import UNKNOWN, HashedNgrams, TextStream, Tokens
from drafter.types import TargetForward

VOCAB = 6
CONCENTRATIONS = (3.0, 2.0, 1.0, 0.5)
SHARED = 0
Row = tuple[int, int, int, int]
"""Scope, the two tokens before, the token."""
Key = TypeVar("Key", int, tuple[int, ...])


class ExactNgrams:
    """The same model with dictionaries."""

    def __init__(self, half_life: int = 10**9):
        self.half_life, self.since = half_life, 0
        self.unigrams: Counter[int] = Counter()
        self.histories: Counter[tuple[int, ...]] = Counter()
        self.ngrams: Counter[tuple[int, ...]] = Counter()
        self.successors: dict[tuple[int, ...], int] = {}

    def observe(self, rows: Sequence[Row], own: bool) -> None:
        for scope, before, last, token in rows:
            self.unigrams[token] += 1
            for home in (SHARED, scope) if own else (SHARED,):
                for history in ((home, last), (home, before, last)):
                    if min(history[1:]) >= 0:
                        self.histories[history] += 1
                        self.ngrams[*history, token] += 1
                        self.successors[history] = token
        self.since += len(rows)
        while self.since >= self.half_life:
            self.since -= self.half_life
            self.unigrams = halved(self.unigrams)
            self.histories, self.ngrams = halved(self.histories), halved(self.ngrams)

    def levels(self, scope: int, before: int, last: int, own: bool) -> list[tuple[int, ...]]:
        scopes = (SHARED, scope) if own else (SHARED,)
        return [history for home in scopes for history in ((home, last), (home, before, last))]

    def probability(self, scope: int, before: int, last: int, token: int, own: bool) -> float:
        result = (self.unigrams[token] + 0.5) / (self.unigrams.total() + 0.5 * VOCAB)
        for level, weight in zip(self.levels(scope, before, last, own), CONCENTRATIONS, strict=False):
            result = (self.ngrams[*level, token] + weight * result) / (self.histories[level] + weight)
        return result

    def successor(self, scope: int, before: int, last: int) -> int:
        history = (scope, before, last)
        return self.successors[history] if self.histories[history] else UNKNOWN


def halved(counts: Counter[Key]) -> Counter[Key]:
    return Counter({key: count // 2 for key, count in counts.items() if count > 1})


def column(rows: Sequence[Row], index: int) -> Tokens:
    return np.array([row[index] for row in rows], dtype=np.int64)


def feed(model: HashedNgrams, rows: Sequence[Row], own: bool = True) -> None:
    model.observe(column(rows, 1), column(rows, 2), column(rows, 3), column(rows, 0) if own else None)


def small(half_life: int = 2**20, cells: int = 2**18) -> HashedNgrams:
    return HashedNgrams(VOCAB, cells, half_life, CONCENTRATIONS)


def look_up(model: HashedNgrams, scope: int, before: int, last: int, own: bool) -> tuple[list[float], list[int]]:
    """Probabilities of the whole vocabulary, and the successors by scope."""
    shape = (1, 1)
    scopes = np.full(shape, scope) if own else None
    histories = model.histories(np.full(shape, before), np.full(shape, last), scopes)
    chances = model.probability(histories, np.arange(VOCAB).reshape(1, 1, -1))
    assert chances.shape == (1, 1, VOCAB) and chances.dtype == np.float32
    return chances[0, 0].tolist(), histories.successors[0, 0].tolist()


def rows_of(tokens: Sequence[int], scope: int) -> list[Row]:
    """The rows of one text from its beginning."""
    padded = [UNKNOWN, UNKNOWN, *tokens]
    return [(scope, *padded[i : i + 3]) for i in range(len(tokens))]  # type: ignore[misc]


ROWS = st.tuples(st.integers(1, 3), st.integers(-1, 3), st.integers(-1, 3), st.integers(0, VOCAB - 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(ROWS, max_size=12), max_size=5), st.sampled_from([4, 7, 10**6]), st.booleans())
def test_the_model_equals_one_of_dictionaries(batches: list[list[Row]], half_life: int, own: bool) -> None:
    model, exact = small(half_life), ExactNgrams(half_life)
    for batch in batches:
        feed(model, batch, own)
        exact.observe(batch, own)
    asked = {(scope, before, last) for batch in batches for scope, before, last, _ in batch}
    for scope, before, last in sorted(asked | {(1, 2, 3), (9, 0, 0)}):
        chances, successors = look_up(model, scope, before, last, own)
        expected = [exact.probability(scope, before, last, token, own) for token in range(VOCAB)]
        assert chances == pytest.approx(expected, rel=1e-4)
        homes = [SHARED, scope] if own else [SHARED]
        assert successors == [exact.successor(home, before, last) for home in homes]


@settings(max_examples=40, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=60), st.sampled_from([5, 10**6]))
def test_probabilities_sum_to_one_and_to_no_more_once_something_is_forgotten(rows: list[Row], half_life: int) -> None:
    model = small(half_life)
    feed(model, rows)
    for scope, before, last, _ in rows:
        total = sum(look_up(model, scope, before, last, own=True)[0])
        assert total == pytest.approx(1, abs=1e-4) if half_life > len(rows) else total <= 1.0001


def test_how_a_text_is_cut_into_batches_does_not_matter() -> None:
    rows = rows_of(np.random.default_rng(0).integers(0, VOCAB, 60).tolist(), 1)
    at_once, piecewise = small(), small()
    feed(at_once, rows)
    for start in range(0, len(rows), 7):
        feed(piecewise, rows[start : start + 7])
    for before in range(VOCAB):
        for last in range(VOCAB):
            assert look_up(at_once, 1, before, last, True) == look_up(piecewise, 1, before, last, True)


def test_a_request_sees_its_own_text_and_what_all_share_but_not_another_ones_own() -> None:
    model = small()
    feed(model, rows_of([1, 2, 3], 1))
    mine, others, shared = (look_up(model, *args) for args in ((1, 1, 2, True), (2, 1, 2, True), (0, 1, 2, False)))
    assert mine[1] == [3, 3] and others[1] == [3, UNKNOWN] and shared[1] == [3]
    assert mine[0][3] > others[0][3] == pytest.approx(shared[0][3])
    assert others[0][3] > others[0][4]


def test_the_latest_successor_counts_even_within_a_batch() -> None:
    model = small()
    feed(model, [(1, 0, 1, 2), (1, 0, 1, 4), (1, 0, 1, 3)])
    assert look_up(model, 1, 0, 1, True)[1] == [3, 3]
    feed(model, [(2, 0, 1, 5)])
    assert look_up(model, 1, 0, 1, True)[1] == [5, 3]


def test_the_model_keeps_adapting() -> None:
    model = small(half_life=64)
    feed(model, [(1, 0, 1, 2)] * 64)
    feed(model, [(1, 0, 1, 3)] * 64)
    chances, _ = look_up(model, 1, 0, 1, True)
    assert chances[3] > 1.7 * chances[2]
    feed(model, [(1, 4, 4, 4)] * 64 * 8)
    forgotten, successors = look_up(model, 1, 0, 1, True)
    assert successors == [UNKNOWN, UNKNOWN] and forgotten[4] == max(forgotten)


def test_a_bucket_holds_as_many_new_ngrams_as_it_has_ways() -> None:
    model, exact, row = small(cells=4), ExactNgrams(), (1, 3, 4, 5)
    feed(model, [row], own=False)
    exact.observe([row], own=False)
    expected = [exact.probability(1, 3, 4, token, False) for token in range(VOCAB)]
    assert look_up(model, 1, 3, 4, False)[0] == pytest.approx(expected, rel=1e-4)


def test_too_small_a_table_forgets_the_rare_and_never_invents() -> None:
    generator = np.random.default_rng(1)
    model, exact = HashedNgrams(400, cells=64), ExactNgrams()
    for _ in range(30):
        noise: list[Row] = [(1, *generator.integers(0, 400, 3).tolist()) for _ in range(20)]
        rows = [*noise, *[(1, 7, 8, 9)] * 5]
        feed(model, rows)
        exact.observe(rows, own=True)
    pairs = list(exact.histories)
    trigrams = [pair for pair in pairs if len(pair) == 3]
    scopes, before, last = (np.array([pair[i] for pair in trigrams]) for i in range(3))
    totals = model.histories(before, last, scopes).totals
    own = np.array([exact.histories[pair] if pair[0] else 0 for pair in trigrams])
    found = totals[:, 3] > 0
    assert bool((totals[:, 3] <= own)[scopes > 0].all())
    assert found.sum() <= 64 < len(trigrams)
    seen = np.array([ngram[-1] for ngram in exact.ngrams if len(ngram) == 4])
    everything = np.array([ngram[:-1] for ngram in exact.ngrams if len(ngram) == 4]).T
    chances = model.probability(model.histories(everything[1], everything[2], everything[0]), seen[:, None])
    assert chances.min() > 0 and chances.max() <= 1
    histories = model.histories(np.array([7]), np.array([8]), np.array([1]))
    assert histories.successors[0].tolist() == [9, 9] and histories.totals[0].min() >= 100
    assert model.probability(histories, np.array([[9]]))[0, 0] > 0.9


def test_nothing_known_means_uniform() -> None:
    chances, successors = look_up(small(), 1, 2, 3, True)
    assert chances == pytest.approx([1 / VOCAB] * VOCAB) and successors == [UNKNOWN, UNKNOWN]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": 48}, "cells is 48; expected a power of two of at least 4"),
        ({"cells": 2}, "cells is 2"),
        ({"half_life": 0}, "half_life is 0 tokens"),
        ({"half_life": 2**30}, "half_life is 1073741824 tokens"),
        ({"concentrations": (1.0, 1.0, 0.0, 1.0)}, "expected numbers above 0"),
    ],
)
def test_wrong_sizes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashedNgrams(VOCAB, **change)  # type: ignore[arg-type]


class Recorder(HashedNgrams):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(VOCAB, cells=4)
        self.rows: list[Row] = []
        self.shared: list[bool] = []

    def observe(
        self,
        previous2: Tokens,
        previous1: Tokens,
        tokens: Tokens,
        scopes: Tokens | None = None,
        shared: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        assert scopes is not None and shared is not None
        self.shared += shared.tolist()
        self.rows += zip(scopes.tolist(), previous2.tolist(), previous1.tolist(), tokens.tolist(), strict=True)


@dataclass
class Run:
    """What one pass does for one request: tokens that are run from ``first`` on, and what is emitted."""

    request_id: str
    first: int
    tokens: list[int]
    final: int
    emitted: list[int] = field(default_factory=list)
    private: bool = False


def target_forward(runs: Sequence[Run], finished: Sequence[str] = ()) -> TargetForward:
    starts = [0]
    for run in runs:
        starts.append(starts[-1] + len(run.tokens))
    count = starts[-1]
    return TargetForward(
        request_ids=[run.request_id for run in runs],
        row_starts=torch.tensor(starts),
        token_ids=torch.tensor([token for run in runs for token in run.tokens]),
        positions=torch.tensor([run.first + i for run in runs for i in range(len(run.tokens))]),
        slot_mapping=torch.zeros(count, dtype=torch.int64),
        block_table=torch.zeros(len(runs), 1, dtype=torch.int32),
        hidden_states=[],
        context_lens=torch.tensor([run.final for run in runs]),
        sampled=[run.emitted for run in runs],
        draft_limits=[9] * len(runs),
        end_tokens=[set()] * len(runs),
        private=[run.private for run in runs],
        finished=finished,
        prompt_lens=[1] * len(runs),
        sampling=[None] * len(runs),
    )


def stream() -> tuple[TextStream, Recorder]:
    recorder = Recorder()
    return TextStream(recorder), recorder


def test_a_prompt_in_chunks_then_an_answer_with_drafts() -> None:
    texts, recorder = stream()
    texts.take(target_forward([Run("a", 0, [10, 11, 12], 3)]))
    texts.take(target_forward([Run("a", 3, [13, 14], 5, [15])]))
    assert texts.context(["a"]).before.tolist() == [14]
    # Drafts 16, 17, 99 behind 15: two are accepted and the target goes on with 18.
    texts.take(target_forward([Run("a", 5, [15, 16, 17, 99], 8, [16, 17, 18])]))
    assert recorder.rows == rows_of(list(range(10, 19)), 1)
    assert texts.context(["a"]).before.tolist() == [17] and texts.context(["a"]).scopes.tolist() == [1]
    texts.take(target_forward([Run("a", 8, [18, 98, 97], 9, [19])]))
    assert recorder.rows == rows_of(list(range(10, 20)), 1)


def test_private_requests_count_for_themselves_alone() -> None:
    texts, recorder = stream()
    texts.take(target_forward([Run("a", 0, [10, 11], 2, [12], private=True), Run("b", 0, [20], 1, [21])]))
    assert recorder.shared == [False] * 3 + [True] * 2
    ngrams, text = HashedNgrams(VOCAB), np.array([3, 4, 5, 3, 4], dtype=np.int64)
    before = ngrams.probability(ngrams.histories(text[:1], text[1:2]), text[None, 2:3])
    ngrams.observe(text[:-2], text[1:-1], text[2:], np.full(3, 1), np.zeros(3, dtype=np.bool_))
    others = ngrams.histories(text[:1], text[1:2], np.array([2]))
    np.testing.assert_array_equal(ngrams.probability(others, text[None, 2:3]), before)
    assert others.successors.tolist() == [[UNKNOWN, UNKNOWN]]
    own = ngrams.histories(text[:1], text[1:2], np.array([1]))
    assert float(ngrams.probability(own, text[None, 2:3])[0, 0]) > 0.4


def test_tokens_of_the_prefix_cache_stay_unknown() -> None:
    texts, recorder = stream()
    texts.take(target_forward([Run("a", 4, [14], 5, [15])]))
    assert recorder.rows == [(1, UNKNOWN, UNKNOWN, 14), (1, UNKNOWN, 14, 15)]
    assert texts.context(["a"]).before.tolist() == [14]


def test_a_preempted_request_does_not_count_twice() -> None:
    texts, recorder = stream()
    texts.take(target_forward([Run("a", 0, [10, 11, 12], 3, [13])]))
    texts.take(target_forward([Run("a", 3, [13], 4, [14])]))
    before = list(recorder.rows)
    texts.take(target_forward([Run("a", 0, [10, 11], 2)]))
    texts.take(target_forward([Run("a", 2, [12, 13], 4)]))
    assert recorder.rows == before and texts.context(["a"]).before.tolist() == [13]
    texts.take(target_forward([Run("a", 4, [14], 5, [15])]))
    assert recorder.rows == rows_of(list(range(10, 16)), 1)


def test_a_position_counts_once_even_if_another_token_comes_there() -> None:
    texts, recorder = stream()
    texts.take(target_forward([Run("a", 0, [10, 11], 2, [12])]))
    texts.take(target_forward([Run("a", 2, [12], 3, [13])]))
    texts.take(target_forward([Run("a", 0, [10, 11], 2, [99])]))
    assert recorder.rows == rows_of([10, 11, 12, 13], 1) and texts.context(["a"]).before.tolist() == [12]


def test_a_gap_breaks_the_history() -> None:
    texts, recorder = stream()
    texts.take(target_forward([Run("a", 0, [10, 11], 2)]))
    texts.take(target_forward([Run("a", 6, [16, 17], 8, [18])]))
    assert recorder.rows[2:] == [(1, UNKNOWN, UNKNOWN, 16), (1, UNKNOWN, 16, 17), (1, 16, 17, 18)]


def test_a_finished_request_is_forgotten_and_its_name_starts_afresh() -> None:
    texts, recorder = stream()
    texts.take(target_forward([Run("a", 0, [10, 11], 2, [12])]))
    texts.take(target_forward([Run("b", 0, [20], 1)], finished=["a", "never seen"]))
    with pytest.raises(KeyError):
        texts.context(["a"])
    texts.take(target_forward([Run("a", 0, [30], 1, [31])]))
    assert recorder.rows[-2:] == [(3, UNKNOWN, UNKNOWN, 30), (3, UNKNOWN, 30, 31)]


@dataclass
class Simulated:
    """A request whose whole text is known beforehand."""

    text: list[int]
    prompt: int
    seen_from: int
    computed: int
    emitted: int = 0
    most: int = 0

    @property
    def known(self) -> int:
        return self.prompt + self.emitted


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_token_that_is_run_counts_once_with_its_history(data: st.DataObject) -> None:
    texts, recorder = stream()
    requests: dict[str, Simulated] = {}
    for name in "abc":
        prompt, cached = data.draw(st.integers(2, 6)), data.draw(st.integers(0, 1))
        requests[name] = Simulated(
            data.draw(st.lists(st.integers(0, 50), min_size=30, max_size=30)), prompt, cached, cached
        )
    for _ in range(data.draw(st.integers(1, 6))):
        runs = []
        for name in data.draw(st.sets(st.sampled_from("abc"), min_size=1)):
            request = requests[name]
            if request.emitted and data.draw(st.booleans(), label="preempted"):
                request.computed = data.draw(st.integers(0, request.seen_from))
            runs.append(simulate(name, request, data))
        texts.take(target_forward(runs))
        emitting = [run.request_id for run in runs if run.emitted]
        befores = texts.context(emitting).before.tolist()
        assert befores == [last_but_one(requests[name]) for name in emitting]
    for name, request in requests.items():
        if request.computed > request.seen_from or request.emitted:
            scope = int(texts.context([name]).scopes[0])
            mine = [row for row in recorder.rows if row[0] == scope]
            ran = max(request.most, request.known if request.emitted else 0)
            assert mine == rows_of(request.text[request.seen_from : ran], scope)


def simulate(name: str, request: Simulated, data: st.DataObject) -> Run:
    """Run a chunk, or all that is known and drafts behind it."""
    first, missing = request.computed, request.known - request.computed
    chunk = data.draw(st.integers(1, missing))
    if chunk < missing:
        request.computed += chunk
        request.most = max(request.most, request.computed)
        return Run(name, first, request.text[first : first + chunk], first + chunk)
    accepted, wrong = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    end = request.known + accepted
    request.computed, request.emitted = end, request.emitted + accepted + 1
    emitted = request.text[end - accepted : end + 1]
    return Run(name, first, [*request.text[first:end], *[77] * wrong], end, emitted)


def last_but_one(request: Simulated) -> int:
    return request.text[request.known - 2] if request.known - 2 >= request.seen_from else UNKNOWN
