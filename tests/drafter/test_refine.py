from dataclasses import astuple

import pytest
import torch

from drafter.config import DrafterConfig
from drafter.refine import MASKED, BlockShape, observe, plan_first_pass, plan_pass
from tests.drafter.tiny import dflash_config, shift_config

M = MASKED
SHIFT = BlockShape.of(shift_config(), 4)
CAUSAL = BlockShape.of(dflash_config(causal=True), 3)
BIDIRECTIONAL = BlockShape.of(dflash_config(), 3)


def observed_at(*blocks: list[int]) -> torch.Tensor:
    return torch.tensor(blocks, dtype=torch.int32)


def flags(*blocks: list[int]) -> torch.Tensor:
    return torch.tensor(blocks, dtype=torch.bool)


@pytest.mark.parametrize(
    ("config", "drafts", "slots", "first", "held"),
    [
        (shift_config(), 4, 4, 0, 3),
        (shift_config(), 2, 2, 0, 1),
        (shift_config(), 1, 1, 0, 0),
        (shift_config(causal=False), 2, 4, 0, 2),
        (dflash_config(causal=True), 3, 4, 1, 3),
        (dflash_config(causal=True), 1, 2, 1, 1),
        (dflash_config(), 2, 4, 1, 2),
    ],
    ids=str,
)
def test_a_block_has_the_slots_its_draft_tokens_need(
    config: DrafterConfig, drafts: int, slots: int, first: int, held: int
) -> None:
    shape = BlockShape.of(config, drafts)
    assert astuple(shape) == (slots, drafts, first, config.causal)
    assert shape.held == held
    start = shape.unobserved(2, torch.device("cpu"))
    assert start.tolist() == [[0, *[M] * (slots - 1)]] * 2 and start.dtype == torch.int32
    assert shape.open_drafts(start).tolist() == [[True] * drafts] * 2


def test_open_draft_tokens_are_those_no_observed_slot_holds() -> None:
    blocks = observed_at([0, 2, M, 1], [0, M, 1, M])
    assert torch.equal(SHIFT.open_drafts(blocks), flags([0, 1, 0, 1], [1, 0, 1, 1]))
    assert torch.equal(CAUSAL.open_drafts(blocks), flags([0, 1, 0], [1, 0, 1]))
    few = BlockShape.of(dflash_config(), 2)
    assert torch.equal(few.open_drafts(blocks), flags([0, 1], [1, 0]))


@pytest.mark.parametrize("shape", [SHIFT, CAUSAL, BIDIRECTIONAL], ids=str)
def test_the_first_pass_runs_the_block_in_order(shape: BlockShape) -> None:
    plan = plan_pass(shape, shape.unobserved(2, torch.device("cpu")), torch.tensor([7, 40]), 1)
    assert plan.slots.tolist() == plan.places.tolist() == [[0, 1, 2, 3]] * 2
    assert plan.positions.tolist() == [[7, 8, 9, 10], [40, 41, 42, 43]]
    assert plan.visible.tolist() == ([[1, 2, 3, 4]] * 2 if shape.causal else [[4] * 4] * 2)
    assert plan.predicting.tolist() == [[slot >= shape.first for slot in range(4)]] * 2


def test_a_later_pass_runs_what_is_new_and_what_is_masked() -> None:
    """After two passes: the first block observed slot 3 and then slot 1, the second slots 1 and 2 and then slot 3."""
    blocks = observed_at([0, 2, M, 1], [0, 1, 1, 2])
    plan = plan_pass(SHIFT, blocks, torch.tensor([10, 20]), 3)
    # Final are the anchor and what was observed after pass 1: two slots of the first block, three of the second.
    assert plan.places.tolist() == [[2, 3], [3, -1]]
    assert plan.slots[0].tolist() == [1, 2] and plan.slots[1, 0] == 3
    assert plan.positions[0].tolist() == [11, 12] and plan.positions[1, 0] == 23
    assert plan.visible.tolist() == [[3, 4], [4, 1]]
    assert torch.equal(plan.predicting, flags([1, 0], [1, 0]))
    plan = plan_pass(CAUSAL, blocks, torch.tensor([10, 20]), 3)
    assert plan.places.tolist() == [[2, 3], [3, -1]]
    # Slots predict the token that they hold: the second block has nothing left to predict.
    assert torch.equal(plan.predicting, flags([0, 1], [0, 0]))


def test_a_bidirectional_block_is_run_whole() -> None:
    plan = plan_pass(BIDIRECTIONAL, observed_at([0, 2, M, 1], [0, 1, 1, M]), torch.tensor([10, 20]), 3)
    assert plan.places.tolist() == [[0, 1, 2, 3]] * 2
    assert plan.visible.tolist() == [[4] * 4] * 2
    assert plan.slots.tolist() == [[0, 3, 1, 2], [0, 1, 2, 3]]
    assert plan.positions.tolist() == [[10, 13, 11, 12], [20, 21, 22, 23]]
    assert torch.equal(plan.predicting, flags([0, 0, 0, 1], [0, 0, 0, 1]))


def test_slots_behind_the_wanted_draft_tokens_predict_nothing() -> None:
    shape = BlockShape.of(dflash_config(), 2)
    plan = plan_pass(shape, shape.unobserved(1, torch.device("cpu")), torch.tensor([0]), 1)
    assert torch.equal(plan.predicting, flags([0, 1, 1, 0]))


def test_confident_draft_tokens_become_observed() -> None:
    before = SHIFT.unobserved(4, torch.device("cpu"))
    confident = flags([1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1])
    after, gaining = observe(SHIFT, before, confident, 1)
    assert after.tolist() == [[0, 1, M, 1], [0, M, M, M], [0, M, M, M], [0, 1, 1, 1]]
    assert after.dtype == torch.int32
    # No slot holds the last token: it is never observed, and so it can always be predicted again.
    assert gaining.tolist() == [True, False, False, True]
    assert before.tolist() == [[0, M, M, M]] * 4


def test_what_is_observed_stays_and_does_not_count_again() -> None:
    before = observed_at([0, 1, M, M], [0, 1, M, M])
    after, gaining = observe(SHIFT, before, flags([1, 0, 1, 0], [1, 0, 0, 0]), 2)
    assert after.tolist() == [[0, 1, M, 2], [0, 1, M, M]]
    assert gaining.tolist() == [True, False]


def test_a_block_observed_as_a_whole_gains_nothing() -> None:
    after, gaining = observe(CAUSAL, observed_at([0, 1, M, M], [0, M, M, M]), flags([0, 1, 1], [0, 1, 1]), 2)
    assert after.tolist() == [[0, 1, 2, 2], [0, M, 2, 2]]
    assert gaining.tolist() == [False, True]


def test_a_single_draft_token_of_the_shift_scheme_cannot_be_refined() -> None:
    shape = BlockShape.of(shift_config(), 1)
    after, gaining = observe(shape, shape.unobserved(1, torch.device("cpu")), flags([1]), 1)
    assert after.tolist() == [[0]] and gaining.tolist() == [False]


@pytest.mark.parametrize(
    "shape",
    [SHIFT, CAUSAL, BIDIRECTIONAL, BlockShape.of(shift_config(causal=False), 2), BlockShape.of(dflash_config(), 1)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_first_pass_is_planned_in_advance(shape: BlockShape, dtype: torch.dtype) -> None:
    for first_positions in (torch.tensor([7, 40]), torch.tensor([3]), torch.tensor([0, 1])):
        start = shape.unobserved(len(first_positions), torch.device("cpu"))
        plan = plan_first_pass(shape, first_positions.to(dtype))
        for found, expected in zip(astuple(plan), astuple(plan_pass(shape, start, first_positions, 1)), strict=True):
            assert found.dtype == expected.dtype and found.is_contiguous() and torch.equal(found, expected)
