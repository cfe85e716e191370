"""Linear layers for serving: weights packed once for the processor's matrix kernels.

A draft block has a handful of rows. For those PyTorch's plain ``linear`` re-reads and re-packs the weights on every
call; packing them beforehand is several times faster, and halving their bytes about doubles that.
"""

import torch
import torch.nn.functional as F
from torch import nn

from cuda_ext import ops
from cuda_ext.linear import PackedWeight, WeightFormat, pack, pack_exactly
from drafter.model import MarkovHead


class PackedLinear(nn.Module):
    """``x @ weight.T`` without bias, for inference.

    On the CPU our own kernel runs where it was compiled: each row's result is then the same whatever stands beside
    it. Otherwise oneDNN does, and elsewhere the plain product.

    Args:
        weight: ``[out, in]``.
        lossy: our kernel may round to float16 what no small format holds exactly.
    """

    def __init__(self, weight: torch.Tensor, lossy: bool = False):
        super().__init__()
        weight = weight.detach().contiguous()
        self._weight, self._out = weight, weight.shape[0]
        self._packed: PackedWeight | None = None
        self._onednn: torch.Tensor | None = None
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return
        if ops.kernels().cpu_compiled:
            self._packed = _smallest(weight, lossy)
        elif torch.backends.mkldnn.is_available():
            self._onednn = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        else:
            return
        self._weight = weight.new_empty(0)  # the packed one is enough

    @property
    def packed(self) -> PackedWeight | None:
        """The weight as our kernels take it; ``None`` where they do not run it."""
        return self._packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        result: torch.Tensor
        if self._packed is not None:
            packed = self._packed
            result = ops.linear(rows.contiguous(), packed.panels, packed.scales, self._out, packed.format.value)
        elif self._onednn is not None:
            result = torch.ops.mkldnn._linear_pointwise(rows, self._onednn, None, "none", [], "")
        else:
            return F.linear(x, self._weight)
        return result.view(*x.shape[:-1], self._out)


def _smallest(weight: torch.Tensor, lossy: bool) -> PackedWeight:
    packed = pack_exactly(weight)
    return pack(weight, WeightFormat.FLOAT16) if lossy and packed.format is WeightFormat.FLOAT32 else packed


class PackedMarkovHead:
    """``MarkovHead`` with its weights packed for serving."""

    def __init__(self, head: MarkovHead):
        self._previous = head.previous.weight.detach().contiguous()
        self._logits = PackedLinear(head.logits.weight)

    @property
    def weights(self) -> tuple[torch.Tensor, PackedWeight] | None:
        """``[vocab, rank]`` rows of the token before and what multiplies them, where our kernels run both."""
        packed = self._logits.packed
        return None if packed is None else (self._previous, packed)

    def __call__(self, previous: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor = self._logits(F.embedding(previous, self._previous))
        return bias
