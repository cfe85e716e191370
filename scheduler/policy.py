"""How much of a drafted block is worth verifying; pure, no engine needed."""

from collections.abc import Sequence
from typing import Protocol


class DraftLengthPolicy(Protocol):
    """Decides, for one step of the whole batch, how many draft tokens of each request are verified."""

    def admit(self, survival: Sequence[Sequence[float]]) -> list[int]:
        """Draft tokens to verify per request.

        Args:
            survival: per request, the estimated probability that draft tokens ``0..k`` are all accepted; it falls
                along each request.
        """
        ...


class SurvivalFloor:
    """Admits draft tokens while their survival is at least ``floor``; 0 admits every token.

    A row of the verify pass costs a roughly constant share of a step, so a slot pays for itself when the
    probability of being reached and accepted exceeds that share.
    """

    def __init__(self, floor: float):
        self._floor = floor

    def admit(self, survival: Sequence[Sequence[float]]) -> list[int]:
        return [next((k for k, p in enumerate(row) if p < self._floor), len(row)) for row in survival]
