"""Where the walk in one call is taken; what it drafts is tested with the kernels."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cuda_ext import ops
from drafter.head import DraftHead
from drafter.model import MarkovHead
from drafter.ngram import HashedNgrams
from drafter.options import PathSearch, ProposalOptions
from drafter.packed import PackedMarkovHead
from drafter.path import BeamOptions, BeamSearch
from drafter.search import make_search
from drafter.walk import OneCallWalk, one_call_walk

VOCAB, DRAFT_VOCAB = 30, 20
TOKEN_IDS = torch.arange(5, 25)
needs_kernels = pytest.mark.skipif(not ops.kernels().cpu_compiled, reason="compiled kernels are not built")


def make_head(packed: bool = True, dtype: torch.dtype = torch.float32) -> DraftHead:
    module = MarkovHead(VOCAB, DRAFT_VOCAB, 4).requires_grad_(False)
    markov = PackedMarkovHead(module) if packed else module
    return DraftHead(torch.zeros(DRAFT_VOCAB, 8, dtype=dtype), TOKEN_IDS, markov)


def walk_of(head: DraftHead) -> OneCallWalk | None:
    return one_call_walk(head, [], HashedNgrams(VOCAB, 2**10), 5, 0.8)


class CalledError(Exception):
    pass


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk in one call raises."""

    def refuse(*_: object) -> None:
        raise CalledError

    monkeypatch.setattr(OneCallWalk, "__call__", refuse)


@needs_kernels
def test_a_head_that_our_kernels_run_is_walked_in_one_call() -> None:
    for head in (make_head(), replace(make_head(), markov=None)):
        assert walk_of(head) is not None


def test_other_heads_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert walk_of(make_head(packed=False)) is None
    assert walk_of(make_head(dtype=torch.bfloat16)) is None
    head = make_head()
    absent = replace(ops.kernels(), cpu_compiled=False)
    monkeypatch.setattr(ops, "kernels", lambda: absent)
    assert walk_of(head) is None and walk_of(replace(head, markov=None)) is None
    assert walk_of(make_head()) is None


@needs_kernels
@pytest.mark.usefixtures("refused")
def test_one_path_without_fixed_tokens_is_walked_in_one_call() -> None:
    logits, anchors = torch.zeros(2, 3, DRAFT_VOCAB), torch.tensor([1, 2])
    one, two = (BeamSearch(make_head(), options=BeamOptions(width)) for width in (1, 2))
    with pytest.raises(CalledError):
        one(logits, anchors, None)
    one(logits, anchors, torch.full((2, 3), -1))
    two(logits, anchors, None)


@needs_kernels
@pytest.mark.usefixtures("refused")
def test_the_search_that_serves_walks_in_one_call() -> None:
    search: Any = make_search(ProposalOptions(3, PathSearch.BEAM, beam_width=1), make_head(), VOCAB)
    for beam in (search._likely_beam, search._drawn_beam):
        with pytest.raises(CalledError):
            beam(torch.zeros(1, 3, DRAFT_VOCAB), torch.tensor([1]), None)


def test_the_memory_of_an_ngram_model_is_its_own() -> None:
    model = HashedNgrams(VOCAB, cells=2**8, half_life=40)
    memory = cells, values, unigrams, concentrations = model.memory
    assert concentrations.tolist() == [30, 5, 1, 1] and unigrams.shape == (VOCAB,)
    assert cells.shape == values.shape == (2**6, 4)
    text = np.random.default_rng(0).integers(0, VOCAB, 30)
    for _ in range(5):  # counts are halved three times
        model.observe(text[:-2], text[1:-1], text[2:])
        assert all(one is other for one, other in zip(model.memory, memory, strict=True))
        history = model.histories(text[:1], text[1:2])
        counts = (cells & (2**32 - 1)).flatten()
        assert counts.max() >= history.totals.max() > 0
        assert model.text_mass == int(unigrams.sum()) + VOCAB / 2
        fresh = HashedNgrams(VOCAB, cells=2**8, half_life=40)
        fresh.memory[0].copy_(cells)
        fresh.memory[1].copy_(values)
        assert np.array_equal(fresh.histories(text[:1], text[1:2]).successors, history.successors)
        assert np.array_equal(fresh.histories(text[:1], text[1:2]).totals, history.totals)
