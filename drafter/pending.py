"""Target passes that nobody has drafted behind yet: their context K/V can wait, and be written in one go."""

from dataclasses import dataclass, field

import torch

from drafter.types import TargetForward

MOST_ROWS = 32


@dataclass(slots=True)
class PendingForwards:
    """Passes in the order in which they were run.

    To write the context K/V of one row takes as long as of many, as the weights have to be read; so while nothing is
    drafted, rows are collected. Every row of a page is written before anything reads it, and in order: a pass that
    runs a slot again does not join those before it.

    Attributes:
        forwards: the passes.
        rows: of all of them.
    """

    forwards: list[TargetForward] = field(default_factory=list)
    rows: int = 0
    _slots: set[int] = field(default_factory=set)

    @property
    def is_full(self) -> bool:
        """Whether it is time to write them."""
        return self.rows >= MOST_ROWS

    def accepts(self, forward: TargetForward) -> bool:
        """Whether a pass may be written together with those before it."""
        return not self.forwards or self._slots.isdisjoint(forward.slot_mapping.tolist())

    def add(self, forward: TargetForward) -> None:
        """Take another pass."""
        self.forwards.append(forward)
        self.rows += len(forward.positions)
        if not self.is_full:
            self._slots.update(slot for slot in forward.slot_mapping.tolist() if slot >= 0)

    def take(self) -> list[TargetForward]:
        """All passes; none is left."""
        forwards, self.forwards, self.rows = self.forwards, [], 0
        self._slots.clear()
        return forwards


def context_of(forwards: list[TargetForward]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the rows of all passes: ``[rows, feature_size]`` float32 hidden states, positions and slot mapping."""
    hidden_states = [torch.cat(list(forward.hidden_states), dim=-1) for forward in forwards]
    return (
        _joined(hidden_states).to(torch.float32),
        _joined([forward.positions for forward in forwards]),
        _joined([forward.slot_mapping for forward in forwards]),
    )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
