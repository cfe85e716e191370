"""The operations of ``cuda_ext.reference`` as PyTorch operators, ``torch.ops.slipstream.*``.

Each is registered once: schema and fake kernel here, CPU and CUDA kernels by the compiled libraries where
``cuda_ext.library`` finds them, and the reference wherever it does not. Callers import the functions below; what
runs behind them is told by ``kernels()``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cuda_ext import library, reference

_SCHEMAS = {
    "block_attention": (
        "(Tensor query, Tensor block_key, Tensor block_value, Tensor key_cache, Tensor value_cache, "
        "Tensor block_tables, Tensor context_lens, Tensor visible, float scale) -> Tensor"
    ),
    "partition_block": "(Tensor observed_at, Tensor first_positions) -> (Tensor, Tensor, Tensor, Tensor)",
    "write_context": (
        "(Tensor key, Tensor value, Tensor? key_norm, float eps, Tensor rotary_table, Tensor positions, "
        "Tensor slot_mapping, Tensor(a!) key_cache, Tensor(b!) value_cache) -> ()"
    ),
    "append_block": (
        "(Tensor qkv, Tensor? query_norm, Tensor? key_norm, float eps, Tensor rotary_table, Tensor positions, "
        "Tensor places, Tensor(a!) block_key, Tensor(b!) block_value) -> Tensor"
    ),
    "linear": "(Tensor input, Tensor panels, Tensor? scales, int out, str format) -> Tensor",
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """What runs the operators: ``cpu`` and ``cuda`` are a description of the compiled kernels, or why there are none.

    Attributes:
        cpu_compiled, cuda_compiled: whether compiled kernels are loaded.
    """

    cpu: str
    cuda: str
    cpu_compiled: bool
    cuda_compiled: bool


def kernels() -> Kernels:
    """What runs the operators in this process."""
    return _KERNELS


def _fake_block_attention(query: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _fake_partition_block(
    observed_at: torch.Tensor, first_positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    order = torch.empty(observed_at.shape, dtype=torch.int64, device=observed_at.device)
    return order, torch.empty_like(order), torch.empty_like(order), torch.empty_like(order, dtype=torch.int32)


def _fake_write_context(*_: object) -> None:
    return None


def _fake_append_block(qkv: torch.Tensor, *arguments: object) -> torch.Tensor:
    block_key = arguments[-2]
    assert isinstance(block_key, torch.Tensor)
    kv_heads, head_dim = block_key.shape[2:]
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // head_dim - 2 * kv_heads, head_dim)


def _fake_linear(
    input: torch.Tensor, panels: torch.Tensor, scales: torch.Tensor | None, out: int, format: str
) -> torch.Tensor:
    del panels, scales, format
    return input.new_empty(input.shape[0], out)


_FAKES: dict[str, Callable[..., object]] = {
    "block_attention": _fake_block_attention,
    "partition_block": _fake_partition_block,
    "write_context": _fake_write_context,
    "append_block": _fake_append_block,
    "linear": _fake_linear,
}


def _register() -> tuple[torch.library.Library, Kernels]:
    definitions = torch.library.Library("slipstream", "DEF")
    for name, schema in _SCHEMAS.items():
        definitions.define(name + schema)
        torch.library.register_fake(f"slipstream::{name}", _FAKES[name], lib=definitions)
    cpu, cuda = library.load("cpu"), library.load("cuda")
    for found, key in ((cpu, "CPU"), (cuda, "CUDA")):
        for name in _SCHEMAS:
            if name not in found.operators:
                definitions.impl(name, getattr(reference, name), key)
    return definitions, Kernels(cpu.description, cuda.description, bool(cpu.operators), bool(cuda.operators))


_LIBRARY, _KERNELS = _register()

block_attention = torch.ops.slipstream.block_attention.default
partition_block = torch.ops.slipstream.partition_block.default
write_context = torch.ops.slipstream.write_context.default
append_block = torch.ops.slipstream.append_block.default
linear = torch.ops.slipstream.linear.default
