import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.checkpoint import Drafter, check_fits, load_drafter, save_drafter
from drafter.config import DrafterConfig
from drafter.errors import DrafterCheckpointError
from tests.drafter.tiny import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    VOCAB,
    dflash_config,
    random_drafter,
    random_target,
    shift_config,
    target_shape,
)

CONFIGS = [shift_config(), shift_config(qk_norm=True, markov_rank=0, last_feature=False), dflash_config()]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_drafter(random_drafter(shift_config()), tmp_path, torch.float32)
    return tmp_path


def change(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a file, or drop those that are ``None``; ``__`` in a name stands for a dot."""
    tensors = load_file(path)
    for name, tensor in changes.items():
        del tensors[name.replace("__", ".")]
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path)


def assert_same(left: Drafter, right: Drafter) -> None:
    states = left.model.state_dict(), right.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert left.model.config == right.model.config
    if left.token_ids is None or right.token_ids is None:
        assert left.token_ids is right.token_ids
    else:
        assert torch.equal(left.token_ids, right.token_ids)


@pytest.mark.parametrize("config", CONFIGS, ids=["shift", "plain shift", "dflash"])
def test_a_round_trip_in_float32_is_bitwise(tmp_path: Path, config: DrafterConfig) -> None:
    drafter = random_drafter(config)
    save_drafter(drafter, tmp_path, torch.float32)
    assert_same(load_drafter(tmp_path), drafter)


def test_float16_is_the_default_on_disk_and_float32_in_memory(tmp_path: Path) -> None:
    drafter = random_drafter(shift_config())
    save_drafter(drafter, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    loaded = load_drafter(tmp_path)
    assert torch.equal(loaded.model.fc.weight, drafter.model.fc.weight.half().float())
    assert not loaded.model.training


def test_the_files_carry_dflashs_names_and_only_extras_lie_beside(saved: Path) -> None:
    q_size, kv_size = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "input_layernorm": [HIDDEN],
        "post_attention_layernorm": [HIDDEN],
        "self_attn.q_proj": [q_size, HIDDEN],
        "self_attn.k_proj": [kv_size, HIDDEN],
        "self_attn.v_proj": [kv_size, HIDDEN],
        "self_attn.o_proj": [HIDDEN, q_size],
        "mlp.gate_proj": [INNER, HIDDEN],
        "mlp.up_proj": [INNER, HIDDEN],
        "mlp.down_proj": [HIDDEN, INNER],
    }
    expected = {f"layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"fc.weight": [HIDDEN, 2 * HIDDEN], "hidden_norm.weight": [HIDDEN], "norm.weight": [HIDDEN]}
    stored = load_file(saved / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == expected
    extra = load_file(saved / "slipstream.safetensors")
    assert {name: list(tensor.shape) for name, tensor in extra.items()} == {
        "slot_embedding": [4, HIDDEN],
        "last_feature_proj.weight": [HIDDEN, HIDDEN],
        "markov.previous.weight": [VOCAB, 5],
        "markov.logits.weight": [24, 5],
        "draft_vocabulary": [24],
    }
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "slipstream.safetensors",
    ]


def test_the_parts_of_a_fused_projection_keep_their_places(saved: Path) -> None:
    fused = load_drafter(saved).model.state_dict()
    stored = load_file(saved / "model.safetensors")
    parts = [stored[f"layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(parts), fused["layers.1.qkv_proj.weight"])
    parts = [stored[f"layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(torch.cat(parts), fused["layers.1.gate_up_proj.weight"])


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_public_checkpoint_loads(tmp_path: Path, prefix: str) -> None:
    drafter = random_drafter(dflash_config())
    save_drafter(drafter, tmp_path, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    assert "layers.0.self_attn.q_norm.weight" in stored and "layers.0.self_attn.k_norm.weight" in stored
    assert not (tmp_path / "slipstream.safetensors").exists()
    save_file({prefix + name: tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["slipstream_config"], config["dflash_config"]["causal"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_same(load_drafter(tmp_path), drafter)


def test_the_head_is_cut_to_the_draft_vocabulary() -> None:
    target = random_target(dtype=torch.bfloat16)
    drafter = random_drafter(shift_config())
    assert drafter.token_ids is not None
    head = drafter.head(target)
    assert head.weight.dtype == torch.float32
    assert torch.equal(head.weight, target.output_head[drafter.token_ids].float())
    assert head.token_ids is drafter.token_ids and head.markov is drafter.model.markov
    whole = random_drafter(dflash_config()).head(target)
    assert torch.equal(whole.weight, target.output_head.float()) and whole.token_ids is None and whole.markov is None


def test_saving_over_another_drafter_leaves_nothing_of_it(saved: Path) -> None:
    drafter = random_drafter(dflash_config())
    save_drafter(drafter, saved, torch.float32)
    assert_same(load_drafter(saved), drafter)


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(DrafterCheckpointError) as caught:
        load_drafter(saved)
    assert str(caught.value) == f"{saved} is not a drafter checkpoint: model.safetensors is missing"


@pytest.mark.parametrize("file", ["model.safetensors", "slipstream.safetensors"])
@pytest.mark.parametrize("kept", [0, 4, 200, -8])
def test_a_truncated_file_is_named(saved: Path, file: str, kept: int) -> None:
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[:kept])
    with pytest.raises(DrafterCheckpointError, match=f"{saved / file}: not a readable safetensors file"):
        load_drafter(saved)


@pytest.mark.parametrize("name", ["fc", "layers.1.self_attn.o_proj", "layers.0.mlp.down_proj", "layers.0.mlp.up_proj"])
def test_a_missing_tensor_is_named(saved: Path, name: str) -> None:
    change(saved / "model.safetensors", **{f"{name}.weight".replace(".", "__"): None})
    module = name.rpartition(".")[2]
    with pytest.raises(
        DrafterCheckpointError, match=rf"{saved}: tensors do not match config.json: .*\b{module}.weight"
    ):
        load_drafter(saved)


def test_a_tensor_that_the_configuration_does_not_know_is_named(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    save_file({**tensors, "rotor.weight": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(DrafterCheckpointError) as caught:
        load_drafter(saved)
    assert str(caught.value) == f"{saved}: tensors do not match config.json: rotor.weight"


def test_a_wrong_shape_tells_both_shapes(saved: Path) -> None:
    change(saved / "model.safetensors", fc__weight=torch.zeros(HIDDEN, HIDDEN))
    with pytest.raises(DrafterCheckpointError) as caught:
        load_drafter(saved)
    shapes = f"[{HIDDEN}, {HIDDEN}] stored, [{HIDDEN}, {2 * HIDDEN}] by config.json"
    assert str(caught.value) == f"{saved}: tensor fc.weight has the wrong shape: {shapes}"


@pytest.mark.parametrize("shape", [[HEADS * HEAD_DIM + 1, HIDDEN], [HEADS * HEAD_DIM, HIDDEN + 1], [HIDDEN]])
def test_the_wrong_shape_of_a_part_of_a_fused_projection_is_refused(saved: Path, shape: list[int]) -> None:
    change(saved / "model.safetensors", layers__0__self_attn__q_proj__weight=torch.zeros(shape))
    with pytest.raises(DrafterCheckpointError, match=f"{saved}: .*layers.0"):
        load_drafter(saved)


def test_a_missing_draft_vocabulary_is_told_with_its_size(saved: Path) -> None:
    change(saved / "slipstream.safetensors", draft_vocabulary=None)
    with pytest.raises(DrafterCheckpointError) as caught:
        load_drafter(saved)
    assert str(caught.value) == f"{saved}: a draft vocabulary of 24 tokens is not stored"


@pytest.mark.parametrize("token_ids", [torch.arange(23), torch.arange(17, 17 + 24)], ids=["too short", "unknown id"])
def test_a_draft_vocabulary_that_does_not_fit_is_refused(saved: Path, token_ids: torch.Tensor) -> None:
    change(saved / "slipstream.safetensors", draft_vocabulary=token_ids.int())
    with pytest.raises(DrafterCheckpointError, match=f"{saved}: .*vocabulary"):
        load_drafter(saved)


def test_a_drafter_for_this_target_fits() -> None:
    check_fits(shift_config(target_layer_ids=(0, 3)), target_shape(), "d")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (shift_config(hidden_size=32), "hidden size 32 against 16"),
        (shift_config(vocab_size=50), "vocabulary 50 against 40"),
        (shift_config(target_layer_ids=(0, 4, 9)), "it reads target layers [4, 9] of 4"),
        (shift_config(target_layer_ids=(-1,)), "it reads target layers [-1] of 4"),
        (shift_config(hidden_size=32, vocab_size=50), "hidden size 32 against 16; vocabulary 50 against 40"),
    ],
)
def test_a_drafter_for_another_target_names_both_sides(config: DrafterConfig, problem: str) -> None:
    with pytest.raises(DrafterCheckpointError) as caught:
        check_fits(config, target_shape(), "drafters/d")
    assert str(caught.value) == f"drafter drafters/d does not fit target models/tiny: {problem}"


def test_a_mask_token_that_the_target_does_not_have_is_refused() -> None:
    with pytest.raises(DrafterCheckpointError, match=f"mask token {VOCAB}"):
        check_fits(shift_config(mask_token_id=VOCAB), target_shape(), "d")
