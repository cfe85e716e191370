"""From which probability on a draft token counts as observed."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


class Thresholds(Protocol):
    """Thresholds on the probability of draft tokens."""

    def at(self, pass_number: int, request_ids: Sequence[str], drafts: int) -> torch.Tensor:
        """``[requests, drafts]`` float32 for the draft tokens that pass ``pass_number``, from 1, has predicted."""
        ...


@dataclass(frozen=True, slots=True)
class FixedThreshold:
    """The same threshold always."""

    value: float

    def at(self, pass_number: int, request_ids: Sequence[str], drafts: int) -> torch.Tensor:
        del pass_number
        return torch.full((len(request_ids), drafts), self.value)


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One request's draft as one pass predicted it.

    Attributes:
        tokens: draft tokens.
        probabilities: of each, given those before it.
        predicted: whether the token was the pass's to predict; else it was observed already.
    """

    tokens: Sequence[int]
    probabilities: Sequence[float]
    predicted: Sequence[bool]


@dataclass(slots=True)
class _Request:
    """The latest draft of a request, and the probabilities of its right tokens by pass and draft slot."""

    draft: Sequence[PassRecord] = ()
    right: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(list))


class OneShotThresholds:
    """One-shot dynamic thresholding (OSDT, arXiv 2511.02077): one sequence of a task sets the thresholds for the rest.

    The paper's finding is that confidence varies much between the steps of decoding but hardly between the sequences
    of a task. Here the sequence is the first request that finishes, and the confidences are the probabilities that
    each pass gave to draft tokens with which the target then agreed. The threshold of a pass and draft slot is a
    quantile of them, at most ``cap``, times ``1 - slack``. Until then, and where that request had no such token, the
    fallback holds.

    Args:
        fallback: threshold before calibration.
        quantile: 0 to 1; 0.5 is the median.
        cap: highest threshold before the slack is taken off.
        slack: share by which thresholds are lowered.
        task_of: the task of a request by its id; by default all requests are of one task.
    """

    def __init__(
        self,
        fallback: float,
        quantile: float = 0.5,
        cap: float = 0.75,
        slack: float = 0.2,
        task_of: Callable[[str], str] = lambda request_id: "",
    ):
        self._fallback, self._quantile, self._cap, self._slack = fallback, quantile, cap, slack
        self._task_of = task_of
        self._thresholds: dict[str, dict[tuple[int, int], float]] = {}
        self._requests: dict[str, _Request] = {}

    def at(self, pass_number: int, request_ids: Sequence[str], drafts: int) -> torch.Tensor:
        tables = [self._thresholds.get(self._task_of(request_id), {}) for request_id in request_ids]
        rows = [[table.get((pass_number, slot), self._fallback) for slot in range(drafts)] for table in tables]
        return torch.tensor(rows).view(len(request_ids), drafts)

    def wants(self, request_id: str) -> bool:
        """Whether the request's drafts can still calibrate its task."""
        return self._task_of(request_id) not in self._thresholds

    def proposed(self, request_id: str, passes: Sequence[PassRecord]) -> None:
        """Note a draft, pass by pass; it replaces the one before."""
        self._requests.setdefault(request_id, _Request()).draft = passes

    def emitted(self, request_id: str, tokens: Sequence[int]) -> None:
        """Compare the tokens that the target emitted next with the noted draft."""
        request = self._requests.get(request_id)
        if request is None or not tokens:
            return
        for number, record in enumerate(request.draft, start=1):
            compared = zip(record.tokens, tokens, record.probabilities, record.predicted, strict=False)
            for slot, (draft, token, probability, predicted) in enumerate(compared):
                if predicted and draft == token:
                    request.right[number, slot].append(probability)
        request.draft = ()

    def finished(self, request_ids: Sequence[str]) -> None:
        """Calibrate the tasks of ended requests that have not been; those without a right draft token cannot."""
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None and request.right and self.wants(request_id):
                self._thresholds[self._task_of(request_id)] = {
                    place: self._threshold(probabilities) for place, probabilities in request.right.items()
                }

    def _threshold(self, probabilities: list[float]) -> float:
        level = float(torch.tensor(probabilities, dtype=torch.float64).quantile(self._quantile))
        return min(level, self._cap) * (1 - self._slack)
