"""The shape of a model's decoder layers, as its ``config.json`` tells it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.linear_report import WeightShape

__all__ = ["DEFAULT_SHAPE", "LayerShape", "read_shape"]

_FLAG = "--model-config"
_FAMILIES = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}
"""Models whose layers the operator computes: whether queries, keys and values have a bias, and their heads norms."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A model's decoder layers and its output head.

    Attributes:
        layers: how many.
        hidden, intermediate: width of the residual stream, and of the network's inside.
        heads, kv_heads, head_dim: of attention.
        vocabulary: outputs of the head.
        qkv_bias, head_norms: see ``cuda_ext.decoder.DecoderLayerWeights``.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    qkv_bias: bool = False
    head_norms: bool = False

    @property
    def weights(self) -> tuple[WeightShape, ...]:
        """Of one layer: queries, keys and values; attention's output; gate and up projection; down projection."""
        attended = self.heads * self.head_dim
        return (
            WeightShape(attended + 2 * self.kv_heads * self.head_dim, self.hidden),
            WeightShape(self.hidden, attended),
            WeightShape(2 * self.intermediate, self.hidden),
            WeightShape(self.hidden, self.intermediate),
        )

    @property
    def head(self) -> WeightShape:
        """The output head's weight."""
        return WeightShape(self.vocabulary, self.hidden)

    def layers_flops(self, tokens: int, context: int) -> int:
        """Products and sums of all layers, attention's included.

        Args:
            tokens: of the step, each of which sees those before it.
            context: tokens before the step's.
        """
        seen = tokens * context + tokens * (tokens + 1) // 2
        attention = 4 * self.heads * self.head_dim * seen
        return self.layers * (2 * tokens * sum(weight.numbers for weight in self.weights) + attention)


DEFAULT_SHAPE = LayerShape(30, 576, 1536, 9, 3, 64, 49152)
"""The default target's."""


def read_shape(text: str) -> LayerShape:
    """The shape of a model.

    Args:
        text: path of its ``config.json``, or of the folder that this lies in.

    Raises:
        BenchError: it cannot be read, or the operator does not compute such layers.
    """
    path = Path(text).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{_FLAG} {text}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BenchError(f"{_FLAG} {text}: {path} is not JSON") from error
    if not isinstance(config, dict):
        raise BenchError(f"{_FLAG} {text}: {path} holds no JSON object")
    return _shape(config, text)


def _shape(config: Mapping[str, Any], text: str) -> LayerShape:
    from cuda_ext.linear import PANEL

    family = config.get("model_type")
    if family not in _FAMILIES:
        raise BenchError(f"{_FLAG} {text}: model_type is {json.dumps(family)}, expected one of {', '.join(_FAMILIES)}")
    for key, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(key, expected) != expected:
            raise BenchError(
                f"{_FLAG} {text}: {key} is {json.dumps(config[key])}, expected {json.dumps(expected)}: the operator "
                "computes no other layers"
            )

    def size(key: str, default: int | None = None) -> int:
        value = default if config.get(key) is None else config[key]
        if type(value) is not int or value < 1:
            raise BenchError(f"{_FLAG} {text}: {key} is {json.dumps(value)}, expected a whole number above 0")
        return value

    heads = size("num_attention_heads")
    shape = LayerShape(
        layers=size("num_hidden_layers"),
        hidden=size("hidden_size"),
        intermediate=size("intermediate_size"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", size("hidden_size") // heads),
        vocabulary=size("vocab_size"),
        qkv_bias=_FAMILIES[family][0],
        head_norms=_FAMILIES[family][1],
    )
    if shape.heads % shape.kv_heads:
        raise BenchError(
            f"{_FLAG} {text}: num_attention_heads is {shape.heads}, expected a multiple of num_key_value_heads, "
            f"{shape.kv_heads}"
        )
    if shape.intermediate % PANEL:
        raise BenchError(
            f"{_FLAG} {text}: intermediate_size is {shape.intermediate}, expected a multiple of {PANEL}: the operator "
            "computes no other layers"
        )
    return shape
