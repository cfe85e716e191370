"""Linear layers for serving: weights packed once for the processor's matrix kernels.

A draft block has a handful of rows. For those PyTorch's plain ``linear`` re-reads and re-packs the weights on every
call; oneDNN with weights packed beforehand is several times faster.
"""

import torch
import torch.nn.functional as F
from torch import nn

from drafter.model import MarkovHead


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN can hold this weight packed here."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class PackedLinear(nn.Module):
    """``x @ weight.T`` without bias, for inference; falls back to the plain product where packing is not possible.

    Args:
        weight: ``[out, in]``.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        weight = weight.detach().contiguous()
        self._packed = can_pack(weight)
        self._out = weight.shape[0]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._packed:
            return F.linear(x, self._weight)
        rows = x.reshape(-1, x.shape[-1])
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, None, "none", [], "")
        return result.view(*x.shape[:-1], self._out)


class PackedMarkovHead:
    """``MarkovHead`` with its weights packed for serving."""

    def __init__(self, head: MarkovHead):
        self._previous = head.previous.weight.detach()
        self._logits = PackedLinear(head.logits.weight)

    def __call__(self, previous: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor = self._logits(F.embedding(previous, self._previous))
        return bias
