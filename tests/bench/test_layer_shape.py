from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.layer_shape import read_shape
from tests.bench.kernel_commands import SHAPE, write_config


def test_products_and_sums_are_those_of_every_token_with_all_before_it() -> None:
    numbers = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96)
    scores_and_means = [2 * 2 * (4 * 16) * seen for seen in (11, 12, 13)]
    assert SHAPE.layers_flops(tokens=3, context=10) == 3 * 2 * numbers + 2 * sum(scores_and_means)


def test_a_models_shape_is_that_of_its_config(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    assert read_shape(str(path)) == read_shape(str(tmp_path)) == SHAPE
    write_config(tmp_path, model_type="qwen2")
    assert read_shape(str(path)) == replace(SHAPE, qkv_bias=True)
    write_config(tmp_path, model_type="qwen3", attention_bias=False, hidden_act="silu")
    assert read_shape(str(path)) == replace(SHAPE, head_norms=True)
    write_config(tmp_path, num_key_value_heads=None, head_dim=None)
    assert read_shape(str(path)) == replace(SHAPE, kv_heads=4, head_dim=16)
    write_config(tmp_path, hidden_size=96, head_dim=32)
    assert read_shape(str(path)).head_dim == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, 'model_type is "gemma3", expected one of llama, qwen2, qwen3'),
        ({"model_type": None}, "model_type is null, expected one of"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", expected "silu": the operator computes no other layers'),
        ({"attention_bias": True}, "attention_bias is true, expected false: the operator"),
        ({"mlp_bias": True}, "mlp_bias is true, expected false: the operator"),
        ({"hidden_size": 0}, "hidden_size is 0, expected a whole number above 0"),
        ({"vocab_size": None}, "vocab_size is null, expected a whole number above 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true, expected a whole number above 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, expected a multiple of num_key_value_heads, 3"),
        ({"intermediate_size": 40}, "intermediate_size is 40, expected a multiple of 16"),
    ],
)
def test_a_config_that_the_operator_does_not_compute_is_a_mistake(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_config(tmp_path, **changes)
    with pytest.raises(BenchError) as error:
        read_shape(str(path))
    assert str(error.value).startswith(f"--model-config {path}: {message}")
