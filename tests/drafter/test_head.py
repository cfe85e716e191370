import math
from collections.abc import Sequence

import pytest
import torch

from drafter.head import DraftHead
from drafter.model import MarkovHead
from drafter.types import DraftPath
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


def walk(head: DraftHead, hidden: torch.Tensor, anchors: torch.Tensor) -> DraftPath:
    return head.walk(head.logits(hidden), anchors)


def naive_walk(
    head: DraftHead, hidden: torch.Tensor, anchor: int, fixed: Sequence[int] | None = None
) -> tuple[list[int], list[float]]:
    tokens, probabilities, previous = [], [], anchor
    for slot, state in enumerate(hidden):
        scores = [float((row * state).sum()) for row in head.weight]
        if isinstance(head.markov, MarkovHead):
            correction = head.markov.logits.weight @ head.markov.previous.weight[previous]
            scores = [score + float(extra) for score, extra in zip(scores, correction, strict=True)]
        best = max(range(len(scores)), key=scores.__getitem__)
        if fixed is not None and fixed[slot] >= 0:
            best = fixed[slot] if head.token_ids is None else head.token_ids.tolist().index(fixed[slot])
        probabilities.append(math.exp(scores[best]) / sum(map(math.exp, scores)))
        previous = best if head.token_ids is None else int(head.token_ids[best])
        tokens.append(previous)
    return tokens, probabilities


@pytest.mark.parametrize("markov", [True, False], ids=["markov", "plain"])
@pytest.mark.parametrize("cut", [True, False], ids=["draft vocabulary", "whole vocabulary"])
def test_the_walk_equals_a_naive_one(markov: bool, cut: bool) -> None:
    head, hidden, anchors = make_head(markov, cut), hidden_states(), [0, 8, 39]
    path = walk(head, hidden, torch.tensor(anchors))
    assert path.tokens.dtype == torch.int64 and path.tokens.shape == path.probabilities.shape == (3, 4)
    for block, anchor in enumerate(anchors):
        expected_tokens, expected_probabilities = naive_walk(head, hidden[block], anchor)
        assert path.tokens[block].tolist() == expected_tokens
        assert path.probabilities[block].tolist() == pytest.approx(expected_probabilities, rel=1e-4)


@pytest.mark.parametrize("markov", [True, False], ids=["markov", "plain"])
@pytest.mark.parametrize("cut", [True, False], ids=["draft vocabulary", "whole vocabulary"])
def test_fixed_tokens_stay_and_the_others_follow_them(markov: bool, cut: bool) -> None:
    head, hidden, anchors = make_head(markov, cut), hidden_states(), [0, 8, 39]
    fixed = [[-1, 5, -1, 21], [1, -1, -1, -1], [-1, -1, -1, -1]]
    path = head.walk(head.logits(hidden), torch.tensor(anchors), torch.tensor(fixed))
    for block, anchor in enumerate(anchors):
        expected_tokens, expected_probabilities = naive_walk(head, hidden[block], anchor, fixed[block])
        assert path.tokens[block].tolist() == expected_tokens
        assert all(token in (-1, picked) for token, picked in zip(fixed[block], expected_tokens, strict=True))
        assert path.probabilities[block].tolist() == pytest.approx(expected_probabilities, rel=1e-4)
    # The fixed tokens would not have been picked.
    assert walk(head, hidden, torch.tensor(anchors)).tokens[0, 1] != 5


def test_nothing_fixed_changes_nothing() -> None:
    head, hidden, anchors = make_head(), hidden_states(), torch.arange(3)
    free = walk(head, hidden, anchors)
    same = head.walk(head.logits(hidden), anchors, torch.full((3, 4), -1))
    assert torch.equal(free.tokens, same.tokens) and torch.equal(free.probabilities, same.probabilities)


def test_the_token_before_a_slot_decides() -> None:
    head, state = make_head(), torch.zeros(1, 1, HIDDEN)
    assert isinstance(head.markov, MarkovHead)
    head.markov.previous.weight.zero_()
    head.markov.previous.weight[[8, 9], [0, 1]] = 1.0
    head.markov.logits.weight.zero_()
    head.markov.logits.weight[[2, 6], [0, 1]] = 1.0
    assert walk(head, state, torch.tensor([8])).tokens.tolist() == [[5]]
    assert walk(head, state, torch.tensor([9])).tokens.tolist() == [[39]]


def test_each_slot_is_conditioned_on_the_token_picked_before_it() -> None:
    head = make_head()
    assert isinstance(head.markov, MarkovHead)
    head.markov.previous.weight.zero_()
    head.markov.previous.weight[[0, 11, 21], [0, 1, 2]] = 1.0
    head.markov.logits.weight.zero_()
    head.markov.logits.weight[[3, 5, 0], [0, 1, 2]] = 1.0
    assert walk(head, torch.zeros(1, 3, HIDDEN), torch.tensor([0])).tokens.tolist() == [[11, 21, 1]]


@pytest.mark.parametrize("seed", range(4))
def test_survival_is_a_probability_that_never_rises(seed: int) -> None:
    survival = walk(make_head(seed=seed), hidden_states(5, 6, seed=seed), torch.arange(5)).survival
    assert bool((survival <= 1).all()) and bool((survival > 0).all())
    assert bool((survival[:, 1:] < survival[:, :-1]).all())


def test_survival_and_tokens_never_look_at_later_slots() -> None:
    head, hidden, anchors = make_head(), hidden_states(), torch.arange(3)
    path = walk(head, hidden, anchors)
    for slots in (1, 2, 3):
        changed = torch.cat([hidden[:, :slots], 9 * hidden_states(seed=2)[:, slots:]], dim=1)
        for other in (hidden[:, :slots], changed):
            first = walk(head, other, anchors)
            assert torch.equal(first.tokens[:, :slots], path.tokens[:, :slots])
            torch.testing.assert_close(first.survival[:, :slots], path.survival[:, :slots])


def test_survival_is_the_product_of_the_probabilities_so_far() -> None:
    path = DraftPath(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0.5, 0.25, 0.5]]))
    assert path.survival.tolist() == [[0.5, 0.125, 0.0625]]


def test_a_certain_head_survives() -> None:
    head, hidden = make_head(markov=False), torch.zeros(1, 2, HIDDEN)
    head.weight.zero_()
    head.weight[4, 0] = 1.0
    hidden[..., 0] = 60.0
    path = walk(head, hidden, torch.tensor([0]))
    assert path.tokens.tolist() == [[20, 20]] and path.survival.tolist() == [[1.0, 1.0]]
