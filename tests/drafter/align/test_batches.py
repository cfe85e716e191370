from dataclasses import replace

import pytest
import torch

from drafter.align.batches import anchor_range, block_mask, draw_observed, make_batch, run_blocks
from drafter.align.corpus import Answer, AnswerId
from drafter.config import DrafterConfig
from tests.drafter.dense import dense_block
from tests.drafter.tiny import HIDDEN, dflash_config, random_drafter, random_target, shift_config

CONFIGS = pytest.mark.parametrize("config", [shift_config(), dflash_config()], ids=["shift", "dflash"])
EVERY_CONFIG = pytest.mark.parametrize(
    "config", [shift_config(), dflash_config(), dflash_config(causal=True)], ids=["shift", "dflash", "causal dflash"]
)


def answer(length: int, prompt_len: int, seed: int = 0) -> Answer:
    generator = torch.Generator().manual_seed(seed)
    hidden = {i: torch.randn(length, HIDDEN, generator=generator).half() for i in (1, 3)}
    return Answer(AnswerId("chat", 1, 0.0), prompt_len, torch.randint(0, 40, (length,), generator=generator), hidden)


ANSWERS = [answer(9, 3), answer(6, 2, seed=1)]
ANCHORS = [torch.tensor([3, 5, 7]), torch.tensor([2, 4])]


@pytest.mark.parametrize(
    ("length", "prompt_len", "expected"), [(6, 2, [2, 3, 4]), (4, 2, [2]), (3, 2, []), (2, 2, []), (3, 3, [])]
)
def test_every_answer_token_but_the_last_can_be_an_anchor(length: int, prompt_len: int, expected: list[int]) -> None:
    assert list(anchor_range(answer(length, prompt_len))) == expected


@CONFIGS
def test_a_batch_is_what_its_fields_say(config: DrafterConfig) -> None:
    batch, count = make_batch(ANSWERS, ANCHORS, config), config.num_draft_tokens
    assert batch.context_sizes == [9, 6] and batch.block_counts == [3, 2]
    assert batch.positions.tolist() == [*range(9), *range(6)]
    assert batch.hidden_states.shape == (15, 2 * HIDDEN) and batch.hidden_states.dtype == torch.float32
    block, row = 0, 0
    for item, anchors in zip(ANSWERS, ANCHORS, strict=True):
        tokens = item.token_ids.tolist()
        for position in range(len(tokens)):
            expected = torch.cat([item.hidden[1][position], item.hidden[3][position]]).float()
            assert torch.equal(batch.hidden_states[row + position], expected)
        for anchor in anchors.tolist():
            assert batch.anchor_positions[block] == anchor
            assert batch.anchor_tokens[block] == tokens[anchor]
            assert batch.anchors[block] == row + anchor - 1
            following = [tokens[i] if i < len(tokens) else -1 for i in range(anchor + 1, anchor + 1 + count)]
            assert batch.labels[block].tolist() == following
            before = [tokens[i] if i < len(tokens) else 0 for i in range(anchor, anchor + count)]
            assert batch.previous[block].tolist() == before
            block += 1
        row += len(tokens)
    assert block == 5 and batch.labels.shape == batch.previous.shape == (5, count)


def test_teacher_rows_predict_the_labels() -> None:
    batch = make_batch(ANSWERS, ANCHORS, shift_config())
    rows, last = batch.teacher_rows(), len(batch.positions) - 1
    tokens = torch.cat([item.token_ids for item in ANSWERS])
    for block in range(5):
        for slot in range(4):
            if batch.labels[block, slot] >= 0:
                assert tokens[rows[block, slot] + 1] == batch.labels[block, slot]
                assert batch.positions[rows[block, slot]] == batch.anchor_positions[block] + slot
            else:
                assert int(rows[block, slot]) <= last
    assert rows[-1].tolist() == [13, 14, 14, 14]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("anchors", "context_size"), [([2], 5), ([1, 1, 4], 4), ([3, 6, 5], 8)])
def test_the_mask_shows_the_context_before_the_anchor_and_the_own_block(
    anchors: list[int], context_size: int, causal: bool
) -> None:
    slots = 3
    mask = block_mask(torch.tensor(anchors), context_size, slots, causal)
    assert mask.dtype == torch.bool and mask.shape == (len(anchors) * slots, context_size + len(anchors) * slots)
    for query in range(mask.shape[0]):
        block, slot = divmod(query, slots)
        for key in range(mask.shape[1]):
            if key < context_size:
                expected = key < anchors[block]
            else:
                other, key_slot = divmod(key - context_size, slots)
                expected = other == block and (key_slot <= slot or not causal)
            assert bool(mask[query, key]) == expected, (query, key)


@CONFIGS
@torch.inference_mode()
def test_blocks_of_several_answers_equal_one_dense_block_each(config: DrafterConfig) -> None:
    model, embedding = random_drafter(config).model, random_target().embedding
    actual = run_blocks(model, make_batch(ANSWERS, ANCHORS, config), embedding)
    assert actual.shape == (5, config.num_draft_tokens, HIDDEN)
    pairs = [(item, anchor) for item, anchors in zip(ANSWERS, ANCHORS, strict=True) for anchor in anchors.tolist()]
    for block, (item, anchor) in enumerate(pairs):
        features = model.context_features(torch.cat([item.hidden[1], item.hidden[3]], dim=-1)[:anchor].float())
        tokens = [int(item.token_ids[anchor]), *[config.mask_token_id] * 3]
        expected = dense_block(model, features, tokens, range(4), embedding)
        torch.testing.assert_close(actual[block], expected, rtol=1e-4, atol=1e-5)


@EVERY_CONFIG
@torch.inference_mode()
def test_observed_slots_stand_in_front_and_hold_the_answer(config: DrafterConfig) -> None:
    model, embedding, count = random_drafter(config).model, random_target().embedding, config.num_draft_tokens
    batch = make_batch(ANSWERS, ANCHORS, config)
    slots_observed = [[2], [1, 3], [], [2, 3], [1]]
    observed = torch.zeros(5, count, dtype=torch.bool)
    for block, slots in enumerate(slots_observed):
        observed[block, [slot - 1 for slot in slots]] = True
    actual = run_blocks(model, replace(batch, observed=observed), embedding)
    pairs = [(item, anchor) for item, anchors in zip(ANSWERS, ANCHORS, strict=True) for anchor in anchors.tolist()]
    for block, (item, anchor) in enumerate(pairs):
        features = model.context_features(torch.cat([item.hidden[1], item.hidden[3]], dim=-1)[:anchor].float())
        known = [0, *slots_observed[block]]
        order = [*known, *(slot for slot in range(4) if slot not in known)]
        tokens = [int(item.token_ids[anchor + slot]) if slot in known else config.mask_token_id for slot in range(4)]
        expected = dense_block(model, features, tokens, order, embedding)
        torch.testing.assert_close(actual[block], expected, rtol=1e-4, atol=1e-5)


LABELS = torch.tensor([[5, 6, 7, 8], [5, 6, -1, -1], [-1, -1, -1, -1]])


@CONFIGS
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_observed_draft_tokens_are_drawn_evenly(config: DrafterConfig, share: float) -> None:
    labels = LABELS[:, : config.num_draft_tokens].repeat(4000, 1)
    observed = draw_observed(labels, share, config, torch.Generator().manual_seed(3))
    assert observed is not None and observed.shape == labels.shape and observed.dtype == torch.bool
    assert not bool(observed[labels < 0].any())
    # Slots 1 to 3 hold draft tokens 0 to 2; the shift scheme's fourth is held by none.
    for row, possible in ((0, 3), (1, 2)):
        blocks = observed[row::3]
        counts = torch.bincount(blocks.sum(dim=1), minlength=possible + 1) / 4000
        assert counts[0] == pytest.approx(1 - share, abs=0.03)
        assert counts[1:].tolist() == pytest.approx([share / possible] * possible, abs=0.03)
        mean = share * (possible + 1) / 2 / possible
        held = [mean] * possible + [0.0] * (config.num_draft_tokens - possible)
        assert blocks.float().mean(dim=0).tolist() == pytest.approx(held, abs=0.03)


def test_without_a_share_nothing_is_drawn() -> None:
    generator = torch.Generator().manual_seed(3)
    assert draw_observed(LABELS, 0.0, shift_config(), generator) is None
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())


def test_observed_labels_do_not_count() -> None:
    batch = make_batch(ANSWERS, ANCHORS, shift_config())
    assert torch.equal(batch.counted(), batch.labels >= 0)
    observed = torch.zeros(5, 4, dtype=torch.bool)
    observed[1, [0, 2]] = True
    counted = replace(batch, observed=observed).counted()
    expected = batch.labels >= 0
    assert expected[1].tolist() == [True, True, True, False]
    expected[1] = torch.tensor([False, True, False, False])
    assert torch.equal(counted, expected)


def test_the_missing_hidden_state_of_the_last_token_is_never_read() -> None:
    config, embedding = shift_config(), random_target().embedding
    item = answer(6, 2)
    poisoned = replace(item, hidden={i: h.clone() for i, h in item.hidden.items()})
    for hidden in poisoned.hidden.values():
        hidden[-1] = 1000.0
    anchors, model = [torch.tensor([2, 3, 4])], random_drafter(config).model
    outputs = [run_blocks(model, make_batch([a], anchors, config), embedding) for a in (item, poisoned)]
    assert torch.equal(*outputs)


def test_every_parameter_of_the_network_learns() -> None:
    config = shift_config(markov_rank=0)
    model = random_drafter(config).model.train()
    run_blocks(model, make_batch(ANSWERS, ANCHORS, config), random_target().embedding).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert silent == []
