"""The processes that train together under ``torchrun``; one alone needs nothing of it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn

_Item = TypeVar("_Item")

# The first rank evaluates while the others wait for its next gradients.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together: each computes gradients of its share of a step's answers.

    Attributes:
        rank: of this one, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Meet the others that ``torchrun`` has started, if it has; each process calls it once."""
        if int(environment.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    @staticmethod
    def leave() -> None:
        """Part from the others, once all of them got here."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this one speaks for all: it evaluates and writes files."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> list[_Item]:
        """This process's part of ``items``; of as many as there are ranks or more, nobody's is empty."""
        return list(items[self.rank :: self.size])

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the gradients of all ranks their mean, in one message."""
        if self.size == 1:
            return
        trained = list(parameters)
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for parameter, mean in zip(trained, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = mean.view_as(parameter)

    def average(self, value: float) -> float:
        """The mean of a number over all ranks."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self.size
