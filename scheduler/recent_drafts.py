"""What drafts of late promised, request by request: the evidence by which coming drafts are judged; numpy only."""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_KEPT, _KEPT_OF_ONE = 64, 12
# Steps after which a draft says nothing any more: about eight probes, so that these alone decide after a while.
_OLDEST = 192
_SCENARIO_ROWS = 16  # how many drafts stand in for a small batch, so that a judgement does not hang on one of them


class RecentDrafts:
    """Survival of the latest drafts. Those of a request speak for its next ones; where there are few, others do too."""

    def __init__(self) -> None:
        self._all: deque[tuple[int, Floats]] = deque(maxlen=_KEPT)
        self.latest = 0  # step of the latest one
        self._own: dict[str, deque[tuple[int, Floats]]] = {}

    def add(self, step: int, request_id: str, survival: Floats) -> None:
        """Note a draft of a request: ``[slots]``, 0 where it has no token."""
        self.latest = step
        self._all.append((step, survival))
        self._own.setdefault(request_id, deque(maxlen=_KEPT_OF_ONE)).append((step, survival))

    def finished(self, request_id: str) -> None:
        """A request is no more; what its drafts taught about others stays."""
        self._own.pop(request_id, None)

    def count(self, step: int) -> int:
        """Drafts that still say something at a step."""
        while self._all and self._all[0][0] < step - _OLDEST:
            self._all.popleft()
        return len(self._all)

    def batches(self, step: int, request_ids: Sequence[str]) -> Floats:
        """Drafts of the coming step as they may turn out, ``[batches, requests, slots]``; needs a ``count`` above 0.

        Short drafts are prolonged by what longer ones promise. Slots that none of them has are 0.
        """
        count = self.count(step)
        batches = max(1, _SCENARIO_ROWS // len(request_ids))
        own = [self._fresh(step, request_id, batches) for request_id in request_ids]
        missing = sum(batches - len(drafts) for drafts in own)
        others = (self._all[place][1] for place in np.linspace(count - 1, 0, missing).astype(np.int64).tolist())
        rows = [drafts + [next(others) for _ in range(batches - len(drafts))] for drafts in own]
        result = np.array(rows).swapaxes(0, 1)
        _prolong(result)
        return result

    def _fresh(self, step: int, request_id: str, most: int) -> list[Floats]:
        """A request's latest drafts, latest first."""
        drafts = self._own.get(request_id, ())
        return [survival for noted, survival in reversed(drafts) if noted >= step - _OLDEST][:most]


def _prolong(drafts: Floats) -> None:
    """Fill ``[..., slots]`` behind the ends of drafts, up to the longest one's, as if each went on like an average one.

    Without that, what was drafted short would speak against drafting longer.
    """
    for slot in range(1, drafts.shape[-1]):
        before, here = drafts[..., slot - 1], drafts[..., slot]
        there = here > 0
        if not there.any():
            return
        share = here.sum() / before[there].sum()
        here[~there] = before[~there] * share
