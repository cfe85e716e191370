"""How much of the machine training uses: floating-point operations a second, and the most that were to be had."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

_Result = TypeVar("_Result")

_SIZE, _REPEATS = 1536, 6


def counted(function: Callable[[], _Result]) -> tuple[_Result, int]:
    """What ``function`` returns, and the operations of its matrix products, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops()


def measured_peak(dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product in ``dtype`` on this machine's CPU: the best of a few."""
    left, right = (torch.ones(_SIZE, _SIZE, dtype=dtype) for _ in range(2))
    best = 0.0
    with torch.inference_mode():
        for _ in range(_REPEATS):
            started = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2 * _SIZE**3 / (time.perf_counter() - started))
    return best
