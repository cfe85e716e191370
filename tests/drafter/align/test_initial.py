import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.align.corpus import Answer, AnswerId, Corpus, ShardWriter
from drafter.align.initial import (
    TargetWeights,
    drafter_config,
    frequent_tokens,
    initial_drafter,
    read_target,
    read_tensor,
)
from drafter.config import DrafterConfig, InputScheme
from drafter.model import DrafterLayer
from tests.drafter.tiny import HIDDEN, VOCAB, dflash_config, shift_config, write_target


def split(folder: Path) -> None:
    """Spread a model over two files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{i + 1}-of-00002.safetensors")


@pytest.mark.parametrize("sharded", [False, True])
def test_the_shared_parts_of_a_target_are_read(tmp_path: Path, sharded: bool) -> None:
    tensors = write_target(tmp_path)
    if sharded:
        split(tmp_path)
    target = read_target(tmp_path)
    assert torch.equal(target.embedding, tensors["model.embed_tokens.weight"])
    assert torch.equal(target.output_head, tensors["lm_head.weight"])
    assert torch.equal(target.final_norm, tensors["model.norm.weight"])
    assert target.config == json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for name, tensor in tensors.items():
        assert torch.equal(target.tensor(name), tensor)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    write_target(tmp_path, tied=True)
    target = read_target(tmp_path)
    assert target.output_head is target.embedding


def test_tensors_are_widened(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.5], dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert torch.equal(read_tensor(tmp_path, "a"), torch.tensor([1.5]))


def test_a_tensor_that_is_nowhere_is_named(tmp_path: Path) -> None:
    write_target(tmp_path)
    with pytest.raises(KeyError, match=f"{tmp_path} holds no tensor lm_head.bias"):
        read_tensor(tmp_path, "lm_head.bias")


def corpus_of(folder: Path, *texts: list[int]) -> Corpus:
    writer = ShardWriter(folder)
    for i, text in enumerate(texts):
        writer.add(Answer(AnswerId("chat", i, 0.0), 1, torch.tensor(text), {1: torch.zeros(len(text), 2)}))
    writer.flush()
    return Corpus(folder, (1,))


def test_the_draft_vocabulary_is_what_is_most_frequent(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [9, 9, 9, 4], [9, 4, 7, 30])
    token_ids, covered = frequent_tokens(corpus, 2, VOCAB)
    assert token_ids.dtype == torch.int64 and token_ids.tolist() == [4, 9]
    assert covered == 6 / 8


def test_the_smallest_ids_fill_the_draft_vocabulary_up(tmp_path: Path) -> None:
    token_ids, covered = frequent_tokens(corpus_of(tmp_path, [9, 1, 30]), 6, VOCAB)
    assert token_ids.tolist() == [0, 1, 2, 3, 9, 30]
    assert covered == 1.0


@pytest.mark.parametrize("config", [shift_config(), dflash_config()], ids=["shift", "dflash"])
def test_layers_and_norms_are_the_targets(tmp_path: Path, config: DrafterConfig) -> None:
    tensors = write_target(tmp_path, qk_norm=config.qk_norm)
    model = initial_drafter(config, read_target(tmp_path), None, (2, 0), seed=0).model
    for layer, source in zip(model.layers, (2, 0), strict=True):
        assert isinstance(layer, DrafterLayer)

        def weight(name: str, source: int = source) -> torch.Tensor:
            return tensors[f"model.layers.{source}.{name}.weight"]

        assert torch.equal(layer.input_layernorm.weight, weight("input_layernorm"))
        assert torch.equal(layer.post_attention_layernorm.weight, weight("post_attention_layernorm"))
        parts = [weight(f"self_attn.{name}_proj") for name in "qkv"]
        assert torch.equal(layer.qkv_proj.weight, torch.cat(parts))
        assert torch.equal(layer.o_proj.weight, weight("self_attn.o_proj"))
        assert torch.equal(layer.gate_up_proj.weight, torch.cat([weight("mlp.gate_proj"), weight("mlp.up_proj")]))
        assert torch.equal(layer.down_proj.weight, weight("mlp.down_proj"))
        if config.qk_norm:
            assert layer.q_norm is not None and layer.k_norm is not None
            assert torch.equal(layer.q_norm.weight, weight("self_attn.q_norm"))
            assert torch.equal(layer.k_norm.weight, weight("self_attn.k_norm"))
    assert torch.equal(model.norm.weight, tensors["model.norm.weight"])
    assert torch.equal(model.hidden_norm.weight, tensors["model.layers.2.input_layernorm.weight"])


@pytest.mark.parametrize(("first_layer", "passed"), [(0, 0), (1, 0), (2, 0), (3, 1)])
def test_the_projection_passes_the_nearest_recorded_state_through(
    tmp_path: Path, first_layer: int, passed: int
) -> None:
    write_target(tmp_path)
    config = shift_config(target_layer_ids=(0, 2))  # hidden states 1 and 3
    model = initial_drafter(config, read_target(tmp_path), None, (first_layer, 3), seed=0).model
    states = torch.randn(2, 2, HIDDEN, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.fc(states.flatten(1)), states[:, passed])


def test_the_extras_change_nothing_at_first(tmp_path: Path) -> None:
    write_target(tmp_path)
    model = initial_drafter(shift_config(), read_target(tmp_path), torch.arange(24), (2, 3), seed=0).model
    assert model.slot_embedding is not None and model.last_feature_proj is not None and model.markov is not None
    assert not bool(model.slot_embedding.any()) and not bool(model.last_feature_proj.weight.any())
    assert not bool(model.markov(torch.arange(VOCAB)).any())
    # The product of two zero tables would never learn.
    assert bool(model.markov.previous.weight.any())


def test_the_seed_decides(tmp_path: Path) -> None:
    write_target(tmp_path)
    target = read_target(tmp_path)
    states = [
        initial_drafter(shift_config(), target, None, (2, 3), seed).model.state_dict()["markov.previous.weight"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_the_vocabulary_is_kept(tmp_path: Path) -> None:
    write_target(tmp_path)
    token_ids = torch.arange(24)
    assert initial_drafter(shift_config(), read_target(tmp_path), token_ids, (2, 3), 0).token_ids is token_ids


def test_as_many_layers_are_copied_as_the_drafter_has(tmp_path: Path) -> None:
    write_target(tmp_path)
    with pytest.raises(ValueError, match="shorter"):
        initial_drafter(shift_config(), read_target(tmp_path), None, (2,), seed=0)


def config_for(target: TargetWeights, model_type: str, **changes: Any) -> DrafterConfig:
    config = {**target.config, "model_type": model_type, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    shape: dict[str, Any] = {"copied_layers": (2, 3), "target_layer_ids": (0, 3), "block_size": 5, "mask_token_id": 4}
    return drafter_config(replace(target, config=config), draft_vocab_size=16, **shape, **changes)


def test_a_drafter_in_dflashs_own_scheme_has_nothing_that_vllm_does_not_know(tmp_path: Path) -> None:
    write_target(tmp_path)
    target = read_target(tmp_path)
    ours, plain = config_for(target, "llama", markov_rank=8), config_for(target, "llama", plain_dflash=True)
    assert (ours.num_draft_tokens, ours.qk_norm, ours.markov_rank, ours.draft_vocab_size) == (5, False, 8, 16)
    assert plain.num_draft_tokens == 5 and plain.block_size == 6 and plain.input_scheme is InputScheme.DFLASH
    assert plain.qk_norm and not plain.causal and not plain.last_feature
    assert plain.markov_rank == 0 and plain.draft_vocab_size == plain.vocab_size
    layer = initial_drafter(plain, target, None, (2, 3), 0).model.layers[0]
    assert isinstance(layer, DrafterLayer) and layer.q_norm is not None
    assert bool((layer.q_norm.weight == 1).all())  # the target has none to copy


def test_the_norms_of_a_gemma_are_one_more_than_their_weights(tmp_path: Path) -> None:
    tensors = write_target(tmp_path, qk_norm=True)
    for source in range(4):
        name = f"model.layers.{source}.pre_feedforward_layernorm.weight"
        tensors[name] = torch.full((HIDDEN,), 0.25 + source)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gemma3_text"}), encoding="utf-8")
    target = read_target(tmp_path)
    torch.testing.assert_close(target.final_norm, tensors["model.norm.weight"] + 1)
    assert config_for(target, "gemma3_text").qk_norm
    layer = initial_drafter(shift_config(qk_norm=True), target, torch.arange(24), (2, 3), 0).model.layers[1]
    assert isinstance(layer, DrafterLayer) and layer.q_norm is not None
    assert bool((layer.post_attention_layernorm.weight == 4.25).all())
    torch.testing.assert_close(layer.q_norm.weight.data, tensors["model.layers.3.self_attn.q_norm.weight"] + 1)
    torch.testing.assert_close(layer.o_proj.weight.data, tensors["model.layers.3.self_attn.o_proj.weight"])
