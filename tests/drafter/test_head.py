import math

import pytest
import torch

from drafter.head import DraftHead
from drafter.model import MarkovHead
from tests.drafter.tiny import HIDDEN, VOCAB, fill

DRAFT_VOCAB = 7
TOKEN_IDS = torch.tensor([1, 4, 5, 11, 20, 21, 39])


def make_head(markov: bool = True, cut: bool = True, seed: int = 0) -> DraftHead:
    generator = torch.Generator().manual_seed(seed)
    rows = DRAFT_VOCAB if cut else VOCAB
    correction = MarkovHead(VOCAB, rows, 3) if markov else None
    if correction is not None:
        fill(correction, generator)
        correction.requires_grad_(False)
    return DraftHead(torch.randn(rows, HIDDEN, generator=generator), TOKEN_IDS if cut else None, correction)


def hidden_states(blocks: int = 3, slots: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(blocks, slots, HIDDEN, generator=torch.Generator().manual_seed(seed))


def naive_walk(head: DraftHead, hidden: torch.Tensor, anchor: int) -> tuple[list[int], list[float]]:
    tokens, survival, previous, reached = [], [], anchor, 1.0
    for state in hidden:
        scores = [float((row * state).sum()) for row in head.weight]
        if head.markov is not None:
            correction = head.markov.logits.weight @ head.markov.previous.weight[previous]
            scores = [score + float(extra) for score, extra in zip(scores, correction, strict=True)]
        best = max(range(len(scores)), key=scores.__getitem__)
        reached *= math.exp(scores[best]) / sum(map(math.exp, scores))
        previous = best if head.token_ids is None else int(head.token_ids[best])
        tokens.append(previous)
        survival.append(reached)
    return tokens, survival


@pytest.mark.parametrize("markov", [True, False], ids=["markov", "plain"])
@pytest.mark.parametrize("cut", [True, False], ids=["draft vocabulary", "whole vocabulary"])
def test_the_walk_equals_a_naive_one(markov: bool, cut: bool) -> None:
    head, hidden, anchors = make_head(markov, cut), hidden_states(), [0, 8, 39]
    tokens, survival = head.walk(hidden, torch.tensor(anchors))
    assert tokens.dtype == torch.int64 and tokens.shape == survival.shape == (3, 4)
    for block, anchor in enumerate(anchors):
        expected_tokens, expected_survival = naive_walk(head, hidden[block], anchor)
        assert tokens[block].tolist() == expected_tokens
        assert survival[block].tolist() == pytest.approx(expected_survival, rel=1e-4)


def test_the_token_before_a_slot_decides() -> None:
    head, state = make_head(), torch.zeros(1, 1, HIDDEN)
    assert head.markov is not None
    head.markov.previous.weight.zero_()
    head.markov.previous.weight[[8, 9], [0, 1]] = 1.0
    head.markov.logits.weight.zero_()
    head.markov.logits.weight[[2, 6], [0, 1]] = 1.0
    assert head.walk(state, torch.tensor([8]))[0].tolist() == [[5]]
    assert head.walk(state, torch.tensor([9]))[0].tolist() == [[39]]


def test_each_slot_is_conditioned_on_the_token_picked_before_it() -> None:
    head = make_head()
    assert head.markov is not None
    head.markov.previous.weight.zero_()
    head.markov.previous.weight[[0, 11, 21], [0, 1, 2]] = 1.0
    head.markov.logits.weight.zero_()
    head.markov.logits.weight[[3, 5, 0], [0, 1, 2]] = 1.0
    assert head.walk(torch.zeros(1, 3, HIDDEN), torch.tensor([0]))[0].tolist() == [[11, 21, 1]]


@pytest.mark.parametrize("seed", range(4))
def test_survival_is_a_probability_that_never_rises(seed: int) -> None:
    _, survival = make_head(seed=seed).walk(hidden_states(5, 6, seed=seed), torch.arange(5))
    assert bool((survival <= 1).all()) and bool((survival > 0).all())
    assert bool((survival[:, 1:] < survival[:, :-1]).all())


def test_survival_and_tokens_never_look_at_later_slots() -> None:
    head, hidden, anchors = make_head(), hidden_states(), torch.arange(3)
    tokens, survival = head.walk(hidden, anchors)
    for slots in (1, 2, 3):
        changed = torch.cat([hidden[:, :slots], 9 * hidden_states(seed=2)[:, slots:]], dim=1)
        for other in (hidden[:, :slots], changed):
            first_tokens, first_survival = head.walk(other, anchors)
            assert torch.equal(first_tokens[:, :slots], tokens[:, :slots])
            torch.testing.assert_close(first_survival[:, :slots], survival[:, :slots])


def test_a_certain_head_survives() -> None:
    head, hidden = make_head(markov=False), torch.zeros(1, 2, HIDDEN)
    head.weight.zero_()
    head.weight[4, 0] = 1.0
    hidden[..., 0] = 60.0
    tokens, survival = head.walk(hidden, torch.tensor([0]))
    assert tokens.tolist() == [[20, 20]] and survival.tolist() == [[1.0, 1.0]]
