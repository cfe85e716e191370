"""The operations of ``cuda_ext.reference`` as PyTorch operators, ``torch.ops.slipstream.*``.

Each is registered once: schema and fake kernel here, CPU and CUDA kernels by the compiled libraries where
``cuda_ext.library`` finds them, and the reference wherever it does not. Callers import the functions below; what
runs behind them is told by ``kernels()``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cuda_ext import library, reference

# See cuda_ext.decoder.DecoderLayerWeights.
_LAYER_WEIGHTS = (
    "Tensor input_norm, Tensor post_norm, float eps, Tensor[] panels, Tensor[] scales, str[] formats, int heads, "
    "int intermediate, Tensor? qkv_bias, Tensor? query_norm, Tensor? key_norm"
)
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
    "linear": "(Tensor input, Tensor panels, Tensor? scales, int out, str format) -> Tensor",
    "likely_tokens": "(Tensor logits, Tensor? bias, int count) -> (Tensor, Tensor, Tensor)",
    "decoder_layer": (
        "(Tensor hidden, Tensor? residual, Tensor positions, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor slot_mapping, Tensor block_tables, Tensor context_lens, Tensor query_starts, Tensor rotary_table, "
        "float scale, " + _LAYER_WEIGHTS + ") -> (Tensor, Tensor)"
    ),
    "draft_layer": (
        "(Tensor hidden, Tensor? residual, Tensor positions, Tensor places, Tensor visible, Tensor(a!) block_key, "
        "Tensor(b!) block_value, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor context_lens, "
        "Tensor rotary_table, float scale, " + _LAYER_WEIGHTS + ") -> (Tensor, Tensor)"
    ),
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


def use_instruction_set(name: str) -> None:
    """Run the CPU kernels with the named instruction set from now on, or with the processor's best for ``auto``.

    Raises:
        ValueError: they are not compiled, or the processor does not have it.
    """
    if not _KERNELS.cpu_compiled:
        if name != "auto":
            raise ValueError(f"instruction set is {name}, but there are no CPU kernels: {_KERNELS.cpu}")
        return
    supported = torch.ops.slipstream.supported_cpu_isas().split(",")
    if name not in ("auto", *supported):
        raise ValueError(f"instruction set is {name}, this processor has {', '.join(supported)}")
    torch.ops.slipstream.force_cpu_isa("" if name == "auto" else name)


def _fake_block_attention(query: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _fake_partition_block(
    observed_at: torch.Tensor, first_positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    order = torch.empty(observed_at.shape, dtype=torch.int64, device=observed_at.device)
    return order, torch.empty_like(order), torch.empty_like(order), torch.empty_like(order, dtype=torch.int32)


def _fake_write_context(*_: object) -> None:
    return None


def _fake_linear(
    input: torch.Tensor, panels: torch.Tensor, scales: torch.Tensor | None, out: int, format: str
) -> torch.Tensor:
    del panels, scales, format
    return input.new_empty(input.shape[0], out)


def _fake_likely_tokens(
    logits: torch.Tensor, bias: torch.Tensor | None, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = (logits.shape[0], 1 if bias is None else bias.shape[1])
    return logits.new_empty(*rows, count), logits.new_empty(*rows, count, dtype=torch.int64), logits.new_empty(rows)


def _fake_layer(hidden: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden), torch.empty_like(hidden)


_FAKES: dict[str, Callable[..., object]] = {
    "block_attention": _fake_block_attention,
    "partition_block": _fake_partition_block,
    "write_context": _fake_write_context,
    "linear": _fake_linear,
    "likely_tokens": _fake_likely_tokens,
    "decoder_layer": _fake_layer,
    "draft_layer": _fake_layer,
}


def _register() -> tuple[torch.library.Library, Kernels]:
    definitions = torch.library.Library("slipstream", "DEF")
    for name, schema in _SCHEMAS.items():
        definitions.define(name + schema)
        torch.library.register_fake(f"slipstream::{name}", _FAKES[name], lib=definitions)
    cpu, cuda = library.load("cpu"), library.load("cuda")
    for name in _SCHEMAS:
        for key in ("CPU", "CUDA"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"slipstream::{name}", key):
                definitions.impl(name, getattr(reference, name), key)
    return definitions, Kernels(cpu.description, cuda.description, cpu.found, cuda.found)


_LIBRARY, _KERNELS = _register()

block_attention = torch.ops.slipstream.block_attention.default
partition_block = torch.ops.slipstream.partition_block.default
write_context = torch.ops.slipstream.write_context.default
linear = torch.ops.slipstream.linear.default
likely_tokens = torch.ops.slipstream.likely_tokens.default
decoder_layer = torch.ops.slipstream.decoder_layer.default
draft_layer = torch.ops.slipstream.draft_layer.default
