"""Draft lengths that follow acceptance and load: acceptance model, cost model and controller as one policy; pure."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scheduler.acceptance import AcceptanceModel
from scheduler.controller import DraftController
from scheduler.cost import CostModel, StepLoad
from scheduler.policy import ComingStep


class AdaptivePolicy:
    """Implements ``scheduler.policy.DraftPolicy``.

    Args:
        slots: longest draft.
        least: draft tokens that are verified at least.
        max_tokens: rows of the largest step that is likely.
    """

    def __init__(self, slots: int, least: int, max_tokens: int):
        self.acceptance = AcceptanceModel(slots)
        self.cost = CostModel(max_tokens)
        self._slots = slots
        self._controller = DraftController(self.cost, slots, least)
        self._planned: list[int] = []
        self._confidences: dict[str, tuple[npt.NDArray[np.float64], int]] = {}

    def plan(self, coming: ComingStep) -> list[int]:
        """See ``DraftPolicy``."""
        self._planned = self._controller.plan(coming.request_ids, _load(coming, []))
        return self._planned

    def admit(self, coming: ComingStep, survival: Sequence[Sequence[float]]) -> list[int]:
        """See ``DraftPolicy``."""
        if not any(survival):
            return [0] * len(survival)
        confidences, counts = _conditional(survival, self._slots)
        context_lens = np.array(coming.context_lens, dtype=np.int64)
        calibrated = self.acceptance.survival(coming.request_ids, confidences, counts, context_lens)
        for row, request_id in enumerate(coming.request_ids):
            if counts[row]:
                self._confidences[request_id] = (confidences[row, : counts[row]], coming.context_lens[row])
        return self._controller.admit(coming.request_ids, calibrated, _load(coming, self._planned)).admitted

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        """See ``DraftPolicy``."""
        drafted = self._confidences.pop(request_id, None)
        if drafted is not None and verified:
            confidences, context_len = drafted
            self.acceptance.observe(request_id, confidences, verified, accepted, context_len)

    def step_took(self, load: StepLoad, seconds: float) -> None:
        """See ``DraftPolicy``."""
        self.cost.observe(load, seconds)

    def finished(self, request_id: str) -> None:
        """See ``DraftPolicy``."""
        self._confidences.pop(request_id, None)
        self.acceptance.finished(request_id)
        self._controller.finished(request_id)


def _load(coming: ComingStep, drafts: Sequence[int]) -> StepLoad:
    requests = len(coming.request_ids)
    lengths = [length for length in drafts if length]
    return StepLoad(
        tokens=requests + coming.prompt_tokens,
        requests=requests,
        context_tokens=sum(coming.context_lens),
        drafted_requests=len(lengths),
        drafted_slots=sum(lengths),
    )


def _conditional(
    survival: Sequence[Sequence[float]], slots: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """``[requests, slots]`` probabilities of single tokens given those before them, and how many there are of each."""
    counts = np.array([min(len(row), slots) for row in survival], dtype=np.int64)
    padded = np.zeros((len(survival), slots + 1))
    padded[:, 0] = 1
    for row, values in zip(padded, survival, strict=True):
        row[1 : 1 + min(len(values), slots)] = values[:slots]
    before, reached = padded[:, :-1], padded[:, 1:]
    return np.divide(reached, before, out=np.zeros_like(reached), where=before > 0), counts
