"""What an engine runs at its first start to learn how long its steps take; pure, no engine needed."""

from collections.abc import Sequence

from scheduler.cost import CostModel, StepLoad
from scheduler.policy import Admission, ComingStep, LearningNothing, Offer

_ROUNDS = 3  # through all numbers of draft tokens, per number of requests
_UNDRAFTED = 3  # every third step drafts nothing


class CalibrationPolicy(LearningNothing):
    """Verifies every number of draft tokens in turn, at several numbers of requests, and drafts or does not.

    Implements ``scheduler.policy.DraftPolicy``. What is drafted is of no use and hardly ever accepted: a step takes as
    long all the same.

    Args:
        cost: learns from every step.
        slots: longest draft.
        max_requests: that may run at the same time.
    """

    def __init__(self, cost: CostModel, slots: int, max_requests: int):
        self._cost, self._slots = cost, slots
        # Doubled up to the most: where rows begin to cost their share may well lie beyond a handful of requests.
        self._phases = [1 << k for k in range(max_requests.bit_length())]
        self._steps = 0

    @property
    def steps_per_phase(self) -> int:
        """Decode steps of one phase."""
        return _ROUNDS * (self._slots + 1)

    def next_phase(self) -> int:
        """How many requests are to run next; 0 when everything was seen."""
        return self._phases.pop(0) if self._phases else 0

    def plan(self, coming: ComingStep) -> list[int]:
        """See ``DraftPolicy``."""
        self._steps += 1
        return [self._slots if self._steps % _UNDRAFTED else 0] * len(coming.request_ids)

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        """See ``DraftPolicy``."""
        del coming
        wanted = self._steps % (self._slots + 1)
        return [Admission(min(wanted, len(offer.survival[offer.expected])), offer.expected) for offer in offers]

    def step_took(self, load: StepLoad, seconds: float) -> None:
        """See ``DraftPolicy``."""
        self._cost.observe(load, seconds)
