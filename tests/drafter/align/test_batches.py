import math
from dataclasses import replace

import pytest
import torch

from drafter.align.batches import anchor_range, block_mask, make_batch, run_blocks
from drafter.align.corpus import Answer, AnswerId
from drafter.config import DrafterConfig
from tests.drafter.tiny import HEAD_DIM, HIDDEN, dflash_config, random_drafter, random_target, shift_config

CONFIGS = pytest.mark.parametrize("config", [shift_config(), dflash_config()], ids=["shift", "dflash"])


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
        hidden = torch.cat([item.hidden[1], item.hidden[3]], dim=-1)[:anchor].float()
        features = model.context_features(hidden)
        context = model.context_kv(features, torch.arange(anchor))

        def attend(
            layer: int,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            context: list[tuple[torch.Tensor, torch.Tensor]] = context,
            anchor: int = anchor,
        ) -> torch.Tensor:
            keys = torch.cat([context[layer][0], key[0]]).repeat_interleave(2, dim=1)
            values = torch.cat([context[layer][1], value[0]]).repeat_interleave(2, dim=1)
            scores = torch.einsum("qhd,khd->hqk", query[0], keys) / math.sqrt(HEAD_DIM)
            if config.causal:
                later = torch.ones(4, 4, dtype=torch.bool).triu(1)
                scores[:, :, anchor:] = scores[:, :, anchor:].masked_fill(later, -math.inf)
            return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)[None]

        inputs = model.block_inputs(item.token_ids[anchor : anchor + 1], features[-1:], embedding, 4)
        expected = model(inputs, torch.arange(anchor, anchor + 4)[None], attend)[0]
        torch.testing.assert_close(actual[block], expected, rtol=1e-4, atol=1e-5)


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
