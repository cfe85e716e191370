"""The target's linear layers on the CPU kernel that reads packed weights, through vLLM's own per-layer hook.

vLLM gives every linear layer on a CPU a function ``cpu_linear`` once its weight is loaded. Ours is put there instead,
layer by layer and once for all: which kernel computes a row never depends on how many rows there are, so equal rows
stay equal from batch to batch and from start to start. Layers that the kernel does not serve keep vLLM's.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import vllm.model_executor.layers.utils as layer_utils
from vllm.logger import init_logger

from cuda_ext import ops
from cuda_ext.linear import PackedWeight, WeightFormat, pack, pack_exactly
from scheduler.options import TargetWeights

logger = init_logger(__name__)


class PackedCall:
    """What a layer's ``cpu_linear`` becomes; ``weight`` is what vLLM passes, and no longer needed."""

    def __init__(self, packed: PackedWeight):
        self.packed = packed

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        del weight
        packed = self.packed
        rows = x.reshape(-1, packed.in_features).contiguous()
        result = ops.linear(rows, packed.panels, packed.scales, packed.out_features, packed.format.value)
        if bias is not None:
            result += bias
        return result.view(*x.shape[:-1], packed.out_features)


@contextmanager
def packed_linears(weights: TargetWeights) -> Iterator[None]:
    """While vLLM loads a target inside, its layers get our kernel, with the weights held as ``weights`` says."""
    if weights is TargetWeights.VLLM or not ops.kernels().cpu_compiled:
        yield
        return
    packer = _Packer(weights)
    with mock.patch.object(layer_utils, "dispatch_cpu_unquantized_gemm", packer):
        yield
    packer.report()


class _Packer:
    """Stands in for vLLM's function of the same signature."""

    def __init__(self, weights: TargetWeights):
        self._weights, self._vllm = weights, layer_utils.dispatch_cpu_unquantized_gemm
        # An embedding that is the output head as well is one weight in two layers.
        self._shared: dict[int, PackedWeight] = {}
        self._kept: list[torch.Tensor] = []
        self._found: Counter[WeightFormat] = Counter()
        self._bytes = 0

    def __call__(self, layer: torch.nn.Module, remove_weight: bool) -> None:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if weight.is_meta or weight.dim() != 2 or weight.dtype != torch.float32:
            self._vllm(layer, remove_weight)
            return
        setattr(layer, "cpu_linear", PackedCall(self._pack(weight, remove_weight)))  # noqa: B010  (mypy takes it for a submodule)
        if remove_weight:
            layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)

    def report(self) -> None:
        """Log what was packed how."""
        formats = ", ".join(f"{count} as {format}" for format, count in self._found.most_common())
        logger.info("target weights: %s; %.0f MB are read for one token", formats, self._bytes / 1e6)

    def _pack(self, weight: torch.Tensor, remove_weight: bool) -> PackedWeight:
        if not remove_weight and weight.data_ptr() in self._shared:
            return self._shared[weight.data_ptr()]
        if self._weights is TargetWeights.EXACT:
            packed = pack_exactly(weight)
        else:
            packed = pack(weight, WeightFormat(self._weights.value))
        if not remove_weight:
            self._shared[weight.data_ptr()] = packed
            self._kept.append(weight)  # so that no other weight gets its address
        self._found[packed.format] += 1
        self._bytes += packed.num_bytes
        return packed
