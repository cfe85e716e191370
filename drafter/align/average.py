"""The mean of a network's weights over the last part of its training, which is often better than the last weights."""

from typing import Any

import torch
from torch import nn


class WeightAverage:
    """Sums up weights as they pass by; its state is part of the training's."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, model: nn.Module) -> None:
        """Take the present weights in."""
        self._count += 1
        for name, parameter in model.named_parameters():
            value = parameter.detach().to(torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Give the mean to ``model``; leaves it alone where nothing was taken in."""
        if not self._count:
            return
        for name, parameter in model.named_parameters():
            parameter.copy_(self._sums[name] / self._count)

    def state(self) -> dict[str, Any]:
        """For ``restore``."""
        return {"count": self._count, "sums": self._sums}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        self._count, self._sums = state["count"], state["sums"]
