"""The ways of multiplying a few rows with a weight: our operator in each of its formats, and the libraries."""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from bench.linear_report import MissingLibrary, WeightShape
from cuda_ext import ops
from cuda_ext.linear import BLOCK, PANEL, PackedWeight, WeightFormat, pack, pack_blocks, unpack

__all__ = ["Product", "find_libraries", "held_bytes", "operator_product", "weight_bytes"]

_HUGE_PAGE = 2 * 2**20

# Bytes of 32 numbers of one output.
_BYTES = {
    WeightFormat.FLOAT32: 4 * BLOCK,
    WeightFormat.BFLOAT16: 2 * BLOCK,
    WeightFormat.FLOAT16: 2 * BLOCK,
    WeightFormat.INT8: BLOCK,
    WeightFormat.Q8_0: 2 + BLOCK,
    WeightFormat.Q4_1: 4 + BLOCK // 2,
}
# What stands in 16 bits each in front of a block of 32 numbers, over its scale: that, and an offset which here makes
# random numbers balanced.
_HEADS = {WeightFormat.Q8_0: (1.0,), WeightFormat.Q4_1: (1.0, -7.5)}
# Standard deviation of the whole numbers in random blocks.
_SPREADS = {WeightFormat.Q8_0: 74.0, WeightFormat.Q4_1: 4.6}


class Product(Protocol):
    """A way of multiplying."""

    @property
    def name(self) -> str:
        """Of the library, or the operator's format."""

    @property
    def format(self) -> WeightFormat:
        """How the weight is held."""

    def prepare(self, weight: torch.Tensor) -> Any:
        """What is done once with a float32 weight ``[out, in]``, into memory of its own."""

    def multiply(self, rows: torch.Tensor, prepared: Any) -> torch.Tensor:
        """``[rows, in]`` float32 to ``[rows, out]``."""

    def numbers(self, weight: torch.Tensor, prepared: Any) -> torch.Tensor:
        """The float32 weight that ``prepared`` stands for; ``weight`` unless that was rounded."""


def weight_bytes(format: WeightFormat, shape: WeightShape) -> int:
    """Bytes of a weight, in whole panels of outputs as the operator has them."""
    return -(-shape.out_features // PANEL) * PANEL * shape.in_features * _BYTES[format] // BLOCK


def held_bytes(format: WeightFormat, shape: WeightShape) -> int:
    """Bytes of a weight in whole huge pages, which is what it takes up."""
    return -(-weight_bytes(format, shape) // _HUGE_PAGE) * _HUGE_PAGE


def operator_product(format: WeightFormat) -> Product:
    """The operator with weights of one format."""
    return _BlockedOperator(format) if format in _HEADS else _Operator(format)


class _Operator:
    def __init__(self, format: WeightFormat):
        self.name, self.format = format.value, format

    def prepare(self, weight: torch.Tensor) -> PackedWeight:
        return pack(weight, self.format)

    def multiply(self, rows: torch.Tensor, prepared: PackedWeight) -> torch.Tensor:
        result: torch.Tensor = ops.linear(
            rows, prepared.panels, prepared.scales, prepared.out_features, prepared.format.value
        )
        return result

    def numbers(self, weight: torch.Tensor, prepared: PackedWeight) -> torch.Tensor:
        del weight
        return unpack(prepared)


class _BlockedOperator(_Operator):
    """With blocks of random numbers, about as large as the weight's usually are: which ones makes no difference."""

    def __init__(self, format: WeightFormat, seed: int = 0):
        super().__init__(format)
        self._generator = torch.Generator().manual_seed(seed)

    def prepare(self, weight: torch.Tensor) -> PackedWeight:
        out, inputs = weight.shape
        head = torch.tensor(_HEADS[self.format])
        shape = (out, inputs // BLOCK)
        blocks = torch.randint(0, 256, (*shape, _BYTES[self.format]), dtype=torch.uint8, generator=self._generator)
        scales = (0.5 + torch.rand(*shape, 1, generator=self._generator)) * inputs**-0.5 / _SPREADS[self.format]
        blocks[..., : 2 * len(head)] = (scales * head).half().view(torch.uint8)
        return pack_blocks(blocks.flatten(1), self.format)


class _Library:
    """Float32 only; the results are compared with ``F.linear`` on the same weight."""

    format = WeightFormat.FLOAT32

    def numbers(self, weight: torch.Tensor, prepared: Any) -> torch.Tensor:
        del prepared
        return weight


class _Torch(_Library):
    name = "F.linear"

    def prepare(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.clone()

    def multiply(self, rows: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        return F.linear(rows, prepared)


class _OneDnn(_Library):
    name = "oneDNN"

    def prepare(self, weight: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return packed

    def multiply(self, rows: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, prepared, None, "none", [], "")
        return result


class _VllmOneDnn(_Library):
    """What vLLM gives a float32 layer on a CPU."""

    name = "vLLM oneDNN"

    def __init__(self, custom_ops: Any):
        self._ops = custom_ops

    def prepare(self, weight: torch.Tensor) -> Any:
        return self._ops.create_onednn_mm(weight.t(), 32)

    def multiply(self, rows: torch.Tensor, prepared: Any) -> torch.Tensor:
        result: torch.Tensor = self._ops.onednn_mm(prepared, rows, None)
        return result


def find_libraries() -> tuple[Sequence[Product], Sequence[MissingLibrary]]:
    """The libraries that are installed, and those that are not."""
    found: list[Product] = [_Torch()]
    missing = []
    if torch.backends.mkldnn.is_available():
        found.append(_OneDnn())
    else:
        missing.append(MissingLibrary(_OneDnn.name, "this torch has none"))
    custom_ops = _vllm_operators()
    if isinstance(custom_ops, str):
        missing.append(MissingLibrary(_VllmOneDnn.name, custom_ops))
    else:
        found.append(_VllmOneDnn(custom_ops))
    return found, missing


def _vllm_operators() -> Any:
    """vLLM's module of compiled operators, or why there is none."""
    try:
        custom_ops = importlib.import_module("vllm._custom_ops")
    except (ImportError, OSError, RuntimeError) as error:
        return f"vLLM cannot be imported ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    if not getattr(custom_ops, "_supports_onednn", False):
        return "this vLLM has none"
    return custom_ops
