import math

import pytest
import torch
import torch.nn.functional as F

from drafter.config import DrafterConfig
from drafter.model import BlockDrafter, MarkovHead, RMSNorm, RotaryEmbedding, rotate
from tests.drafter.tiny import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    dflash_config,
    random_drafter,
    random_target,
    shift_config,
)

CONFIGS = pytest.mark.parametrize("config", [shift_config(), dflash_config()], ids=["shift", "dflash"])


def model_of(config: DrafterConfig) -> BlockDrafter:
    return random_drafter(config).model


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def run_block(model: BlockDrafter, slots: int, causal: bool, context: int = 5) -> torch.Tensor:
    """One block after ``context`` rows, with attention written out."""
    features = model.context_features(noise(context, model.config.feature_size))
    keys_values = model.context_kv(features, torch.arange(context))
    inputs = model.block_inputs(torch.tensor([7]), features[-1:], random_target().embedding, slots)

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        keys = torch.cat([keys_values[layer][0], key[0]]).repeat_interleave(2, dim=1)
        values = torch.cat([keys_values[layer][1], value[0]]).repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[0], keys) / math.sqrt(HEAD_DIM)
        if causal:
            later = torch.arange(slots)[None] > torch.arange(slots)[:, None]
            scores[:, :, context:] = scores[:, :, context:].masked_fill(later, -math.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)[None]

    return model(inputs, torch.arange(context, context + slots)[None], attend)[0]  # type: ignore[no-any-return]


def test_the_norm_divides_by_the_root_of_the_mean_square() -> None:
    norm = RMSNorm(3, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0])
    expected = torch.tensor([1.0, 4.0, 9.0]) / math.sqrt(14 / 3 + 0.5)
    torch.testing.assert_close(norm(torch.tensor([1.0, 2.0, 3.0])).detach(), expected)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_rotation_turns_complex_numbers(theta: float) -> None:
    head_dim, positions = 8, torch.tensor([[0, 1, 2], [511, 512, 3000]])
    x = noise(2, 3, 2, head_dim)
    angles = torch.tensor([[[p * theta ** (-2 * i / head_dim) for i in range(4)] for p in row] for row in positions])
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    actual = rotate(x, RotaryEmbedding(head_dim, theta).factors(positions))
    torch.testing.assert_close(actual, torch.cat([turned.real, turned.imag], dim=-1), rtol=1e-4, atol=2e-4)


def test_dot_products_depend_on_distances_only() -> None:
    rotary, query, key = RotaryEmbedding(HEAD_DIM, 10000.0), noise(1, 1, HEAD_DIM), noise(1, 1, HEAD_DIM, seed=6)

    def product(at: int, other: int) -> torch.Tensor:
        left, right = (rotary.factors(torch.tensor([p])) for p in (at, other))
        return (rotate(query, left) * rotate(key, right)).sum()

    torch.testing.assert_close(product(9, 4), product(505, 500), rtol=1e-4, atol=1e-5)
    assert abs(float(product(9, 4) - product(9, 5))) > 1e-3


def test_the_rotary_table_grows_without_changing() -> None:
    rotary, positions = RotaryEmbedding(HEAD_DIM, 10000.0), torch.tensor([3, 100])
    before = rotary.factors(positions)
    rotary.factors(torch.tensor([5000]))
    assert all(torch.equal(a, b) for a, b in zip(before, rotary.factors(positions), strict=True))


def test_a_table_made_without_gradients_serves_training() -> None:
    rotary = RotaryEmbedding(HEAD_DIM, 10000.0)
    with torch.inference_mode():
        rotary.factors(torch.tensor([1]))
    x = noise(1, 1, HEAD_DIM).requires_grad_()
    rotate(x, rotary.factors(torch.tensor([1]))).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_no_positions_need_no_table() -> None:
    assert RotaryEmbedding(HEAD_DIM, 10000.0).factors(torch.tensor([], dtype=torch.int64))[0].shape == (0, 1, HEAD_DIM)


def test_the_markov_head_is_a_product_of_two_tables() -> None:
    head = MarkovHead(6, 4, 3)
    expected = head.previous.weight @ head.logits.weight.T
    torch.testing.assert_close(head(torch.tensor([[5, 0]])), expected[[5, 0]][None])


def test_context_features_are_projected_and_normed() -> None:
    model, hidden = model_of(shift_config()), noise(3, 2 * HIDDEN)
    projected = hidden @ model.fc.weight.T
    expected = projected * (projected.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * model.hidden_norm.weight
    torch.testing.assert_close(model.context_features(hidden), expected)


@CONFIGS
def test_context_keys_are_each_layers_own_and_turned_by_position(config: DrafterConfig) -> None:
    model, features, positions = model_of(config), noise(3, HIDDEN), torch.tensor([4, 0, 9])
    for layer, (key, value) in zip(model.layers, model.context_kv(features, positions), strict=True):
        _, k_weight, v_weight = layer.get_parameter("qkv_proj.weight").split([16, 8, 8])
        expected = (features @ k_weight.T).view(3, 2, HEAD_DIM)
        if config.qk_norm:
            expected = F.rms_norm(expected, (HEAD_DIM,), layer.get_parameter("k_norm.weight"), 1e-5)
        torch.testing.assert_close(key, rotate(expected, model.rotary.factors(positions)))
        torch.testing.assert_close(value, (features @ v_weight.T).view(3, 2, HEAD_DIM))


def test_inputs_of_the_shift_scheme() -> None:
    model, embedding, last = model_of(shift_config()), random_target().embedding, noise(2, HIDDEN)
    assert model.slot_embedding is not None and model.last_feature_proj is not None
    inputs = model.block_inputs(torch.tensor([8, 9]), last, embedding, 3)
    assert inputs.shape == (2, 3, HIDDEN)
    for block, anchor in enumerate((8, 9)):
        for slot, token in enumerate((anchor, 3, 3)):
            feature = last[block] @ model.last_feature_proj.weight.T
            torch.testing.assert_close(inputs[block, slot], embedding[token] + model.slot_embedding[slot] + feature)


def test_inputs_of_dflashs_scheme() -> None:
    model, embedding = model_of(dflash_config()), random_target().embedding
    inputs = model.block_inputs(torch.tensor([8, 9]), noise(2, HIDDEN), embedding, 4)
    assert torch.equal(inputs, embedding[torch.tensor([[8, 3, 3, 3], [9, 3, 3, 3]])])


def test_only_the_shift_scheme_predicts_from_the_anchor_slot() -> None:
    assert run_block(model_of(shift_config()), 4, causal=True).shape == (4, HIDDEN)
    assert run_block(model_of(dflash_config()), 4, causal=False).shape == (3, HIDDEN)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_first_slots_of_a_causal_block_do_not_depend_on_its_length(slots: int) -> None:
    model = model_of(shift_config())
    torch.testing.assert_close(run_block(model, slots, causal=True), run_block(model, 4, causal=True)[:slots])


def test_the_first_slots_of_a_bidirectional_block_depend_on_its_length() -> None:
    model = model_of(dflash_config())
    difference = run_block(model, 3, causal=False) - run_block(model, 4, causal=False)[:2]
    assert float(difference.abs().max()) > 1e-3


@CONFIGS
def test_blocks_do_not_see_each_other(config: DrafterConfig) -> None:
    model, x, positions = model_of(config), noise(3, 4, HIDDEN), torch.arange(4).expand(3, -1)

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        del layer, key
        return query + value.repeat_interleave(HEADS // 2, dim=2)

    together = model(x, positions, attend)
    alone = torch.cat([model(x[i : i + 1], positions[:1], attend) for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_the_layer_adds_attention_and_a_gated_mlp() -> None:
    model, x = model_of(shift_config(num_layers=1)), noise(1, 2, HIDDEN)
    p = {name: tensor.detach() for name, tensor in model.layers[0].named_parameters()}

    def normed(y: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(y, (HIDDEN,), p[f"{name}.weight"], 1e-5)

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        del query, key
        assert layer == 0
        return value.repeat_interleave(2, dim=2)

    values = (normed(x, "input_layernorm") @ p["qkv_proj.weight"][24:].T).view(1, 2, 2, HEAD_DIM)
    y = x + values.repeat_interleave(2, dim=2).flatten(2) @ p["o_proj.weight"].T
    gate, up = (normed(y, "post_attention_layernorm") @ p["gate_up_proj.weight"].T).chunk(2, dim=-1)
    y = y + (gate * gate.sigmoid() * up) @ p["down_proj.weight"].T
    expected = F.rms_norm(y, (HIDDEN,), model.norm.weight, 1e-5)
    torch.testing.assert_close(model(x, torch.arange(2)[None], attend), expected)
