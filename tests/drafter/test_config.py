import json
from pathlib import Path
from typing import Any

import pytest

from drafter.config import DrafterConfig, InputScheme, read_config
from drafter.errors import DrafterCheckpointError
from tests.drafter.tiny import HIDDEN, dflash_config, shift_config


def public_json(**changes: Any) -> dict[str, Any]:
    """What a published DFlash drafter for a Qwen3 target has in its ``config.json``."""
    data = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 5,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "block_size": 16,
        "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    }
    return {name: value for name, value in {**data, **changes}.items() if value != "absent"}


@pytest.mark.parametrize("config", [shift_config(), dflash_config()], ids=["shift", "dflash"])
def test_a_configuration_survives_its_json(config: DrafterConfig) -> None:
    assert DrafterConfig.from_json(json.loads(json.dumps(config.to_json())), "x") == config


def test_a_public_configuration_has_no_extras() -> None:
    assert DrafterConfig.from_json(public_json(), "x") == DrafterConfig(
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=5,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm=True,
        target_layer_ids=(1, 9, 17, 25, 33),
        block_size=16,
        mask_token_id=151669,
        causal=False,
        input_scheme=InputScheme.DFLASH,
        last_feature=False,
        markov_rank=0,
        draft_vocab_size=151936,
    )


def test_our_configuration_speaks_dflash() -> None:
    data = shift_config().to_json()
    assert data["dflash_config"] == {"mask_token_id": 3, "target_layer_ids": [0, 2], "causal": True}
    assert data["architectures"] == ["DFlashDraftModel"] and data["block_size"] == 4
    assert (data["model_type"], dflash_config().to_json()["model_type"]) == ("llama", "qwen3")


def test_the_head_size_may_be_left_to_the_hidden_size() -> None:
    assert DrafterConfig.from_json(public_json(head_dim="absent"), "x").head_dim == 4096 // 32


def test_rope_parameters_come_before_rope_theta() -> None:
    rope = {"rope_type": "default", "rope_theta": 500000}
    assert DrafterConfig.from_json(public_json(rope_parameters=rope), "x").rope_theta == 500000.0


@pytest.mark.parametrize(
    ("config", "draft_tokens"), [(shift_config(), 4), (dflash_config(), 3)], ids=["shift", "dflash"]
)
def test_only_dflashs_anchor_slot_predicts_nothing(config: DrafterConfig, draft_tokens: int) -> None:
    assert config.num_draft_tokens == draft_tokens


def test_layers_become_indices_into_the_hidden_states() -> None:
    config = shift_config(target_layer_ids=(0, 2, 3))
    assert config.hidden_state_layers == (1, 3, 4)
    assert config.feature_size == 3 * HIDDEN


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "block_size"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(DrafterCheckpointError) as caught:
        DrafterConfig.from_json(public_json(**{key: "absent"}), "d/config.json")
    assert str(caught.value) == f"d/config.json: not a DFlash drafter configuration, '{key}' is missing"


@pytest.mark.parametrize("key", ["target_layer_ids", "mask_token_id"])
def test_a_configuration_of_another_kind_of_drafter_is_refused(key: str) -> None:
    dflash = {name: value for name, value in public_json()["dflash_config"].items() if name != key}
    with pytest.raises(DrafterCheckpointError, match=f"not a DFlash drafter configuration, '{key}' is missing"):
        DrafterConfig.from_json(public_json(dflash_config=dflash), "d/config.json")


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, {"type": "yarn", "factor": 4.0}])
def test_a_scaled_rotary_embedding_is_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(DrafterCheckpointError) as caught:
        DrafterConfig.from_json(public_json(rope_scaling=rope), "d/config.json")
    assert str(caught.value) == "d/config.json: rotary embedding of type 'yarn' is not supported"


def test_an_unknown_input_scheme_is_refused() -> None:
    with pytest.raises(DrafterCheckpointError, match="d/config.json.*sideways"):
        DrafterConfig.from_json(public_json(slipstream_config={"input_scheme": "sideways"}), "d/config.json")


def test_the_file_of_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shift_config().to_json()), encoding="utf-8")
    assert read_config(tmp_path) == shift_config()


def test_a_folder_without_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(DrafterCheckpointError) as caught:
        read_config(tmp_path / "nothing")
    assert str(caught.value) == f"{tmp_path / 'nothing'} is not a drafter checkpoint: it has no config.json"


@pytest.mark.parametrize("text", ['{"hidden_size": 1', "", "\x00"])
def test_broken_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(DrafterCheckpointError, match=f"{tmp_path / 'config.json'}: not valid JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["[]", '"text"', '{"dflash_config": []}', '{"dflash_config": null}'])
def test_json_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(DrafterCheckpointError, match=f"{tmp_path / 'config.json'}: "):
        read_config(tmp_path)
