"""When the drafter's context K/V are written: behind every target pass, or not before a draft reads them.

A row's context K/V take a few per cent of what the row took the target. While nothing is drafted, as under a load that
leaves no room for it, that is all the drafter costs, and most of these rows are never read: their requests end first.
So what they are computed from is kept instead, page by page like the K/V themselves. Nothing then depends on the order
of passes, and a page that is used again simply overwrites what was kept of its last owner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from drafter.serving import ServingDrafter
from drafter.types import PagedCacheSpec, TargetForward

_Integers = npt.NDArray[np.int64]

_NOT_WAITING = -1


@dataclass(frozen=True, slots=True)
class WrittenContext:
    """What was written so that some requests can be drafted for.

    Attributes:
        last_features: ``[requests, hidden]``, the context feature of each one's last token.
        rows: that were written.
        late_rows: of these, how many belong to earlier passes.
    """

    last_features: torch.Tensor
    rows: int
    late_rows: int


class ContextKeeper(Protocol):
    """Sees every target pass, in order."""

    def take(self, forward: TargetForward, drafted: Sequence[int]) -> WrittenContext:
        """Take in a pass, and see to it that all context of the requests ``drafted``, rows of it, is in the pages."""
        ...

    def settle(self) -> int:
        """Write what waits for whatever request; returns the rows."""
        ...


def context_keeper(serving: ServingDrafter, cache: PagedCacheSpec) -> ContextKeeper:
    """What suits the device: elsewhere than on a CPU memory is scarcer than time for small products."""
    return LazyContext(serving, cache) if cache.device.type == "cpu" else EagerContext(serving)


class EagerContext:
    """Writes the context K/V of every pass at once."""

    def __init__(self, serving: ServingDrafter):
        self._serving = serving

    def take(self, forward: TargetForward, drafted: Sequence[int]) -> WrittenContext:
        """See ``ContextKeeper``."""
        features = self._serving.context_features(_concatenated(forward.hidden_states).to(torch.float32))
        self._serving.write_context(features, forward.positions, forward.slot_mapping)
        index = torch.tensor(drafted, dtype=torch.int64, device=features.device)
        first_rows = forward.row_starts[:-1][index]
        last_rows = first_rows + forward.context_lens[index] - 1 - forward.positions[first_rows]
        return WrittenContext(features[last_rows], len(features), 0)

    def settle(self) -> int:
        """Nothing waits."""
        return 0


class LazyContext:
    """Keeps hidden states until a draft needs the context K/V that come of them; for CPUs."""

    def __init__(self, serving: ServingDrafter, cache: PagedCacheSpec):
        self._serving, self._page_size = serving, cache.page_size
        self._positions = np.full(cache.num_pages * cache.page_size, _NOT_WAITING)  # of what waits for its K/V
        width, dtype = serving.config.hidden_size, serving.target_dtype
        rows = [torch.empty(len(self._positions), width, dtype=dtype) for _ in serving.config.hidden_state_layers]
        self._hidden_states = [layer.zero_() for layer in rows]  # else a page's first use would take long
        self._kept = [_numpy(layer) for layer in self._hidden_states]

    def take(self, forward: TargetForward, drafted: Sequence[int]) -> WrittenContext:
        """See ``ContextKeeper``."""
        self._keep(forward)
        if not drafted:
            return WrittenContext(torch.empty(0), 0, 0)
        lengths = forward.context_lens.numpy()[drafted]
        slots = self._slots(forward.block_table.numpy()[drafted], lengths)
        last_slots = slots[np.arange(len(drafted)), lengths - 1]
        within = np.arange(slots.shape[1]) < lengths[:, None]
        waiting = np.unique(slots[within & (self._positions[slots] != _NOT_WAITING)])
        features = self._write(waiting)
        new = np.isin(forward.slot_mapping.numpy(), waiting, assume_unique=True).sum()
        last_features = features[torch.from_numpy(np.searchsorted(waiting, last_slots))]
        return WrittenContext(last_features, len(waiting), len(waiting) - int(new))

    def settle(self) -> int:
        """See ``ContextKeeper``."""
        waiting = np.flatnonzero(self._positions != _NOT_WAITING)
        if len(waiting):
            self._write(waiting)
        return len(waiting)

    def _keep(self, forward: TargetForward) -> None:
        hidden_states, positions = forward.hidden_states, forward.positions
        mapping = forward.slot_mapping.numpy()
        if mapping.min() < 0:
            written = np.flatnonzero(mapping >= 0)
            mapping, positions = mapping[written], positions[written]
            hidden_states = [states[written] for states in hidden_states]
        self._positions[mapping] = positions.numpy()
        for kept, states in zip(self._kept, hidden_states, strict=True):
            kept[mapping] = _numpy(states)  # for few rows twice as fast as index_copy_

    def _slots(self, block_tables: npt.NDArray[np.int32], lengths: _Integers) -> _Integers:
        """``[requests, slots]`` of the pages up to the longest of the contexts."""
        pages = block_tables[:, : -(-int(lengths.max()) // self._page_size)].astype(np.int64)
        slots: _Integers = pages[:, :, None] * self._page_size + np.arange(self._page_size)
        return slots.reshape(len(pages), -1)

    def _write(self, slots: _Integers) -> torch.Tensor:
        """Write the K/V of what waits in ``slots``; returns the context features ``[slots, hidden]``."""
        mapping = torch.from_numpy(slots)
        hidden_states = _concatenated([kept[mapping] for kept in self._hidden_states])
        features = self._serving.context_features(hidden_states.to(torch.float32))
        self._serving.write_context(features, torch.from_numpy(self._positions[slots]), mapping)
        self._positions[slots] = _NOT_WAITING
        return features


def _numpy(rows: torch.Tensor) -> npt.NDArray[Any]:
    """``rows``, as what numpy knows: it has no bfloat16."""
    array: npt.NDArray[Any] = (rows.view(torch.int16) if rows.dtype is torch.bfloat16 else rows).numpy()
    return array


def _concatenated(hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(hidden_states), dim=-1)
