"""How many draft tokens to compute and to verify; pure, no engine needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from scheduler.cost import StepLoad


@dataclass(frozen=True, slots=True)
class ComingStep:
    """A step that is about to be scheduled, apart from draft tokens.

    Attributes:
        request_ids: that decode in it, each at least one token.
        context_lens: of each, tokens.
        prompt_tokens: of prompts that the step will read besides.
    """

    request_ids: Sequence[str]
    context_lens: Sequence[int]
    prompt_tokens: int = 0


class DraftPolicy(Protocol):
    """Decides for the whole batch, step by step, and is told what came of it."""

    def plan(self, coming: ComingStep) -> list[int]:
        """Longest draft worth computing for each request, while the step before the coming one still runs."""
        ...

    def admit(self, coming: ComingStep, survival: Sequence[Sequence[float]]) -> list[int]:
        """Draft tokens to verify per request.

        Args:
            survival: per request, the drafter's estimates of the probability that draft tokens ``0..k`` are all
                accepted; they fall along each request, and there are none for requests without a draft.
        """
        ...

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        """Of ``verified`` draft tokens of a request the first ``accepted`` were accepted, and the next was not."""
        ...

    def step_took(self, load: StepLoad, seconds: float) -> None:
        """A step was run."""
        ...

    def finished(self, request_id: str) -> None:
        """A request is no more."""
        ...


class SurvivalFloor:
    """Admits draft tokens while their survival is at least ``floor``, whatever the load; 0 admits every token.

    Args:
        floor: a probability.
        slots: longest draft.
    """

    def __init__(self, floor: float, slots: int):
        self._floor, self._slots = floor, slots

    def plan(self, coming: ComingStep) -> list[int]:
        """Always the longest draft."""
        return [self._slots] * len(coming.request_ids)

    def admit(self, coming: ComingStep, survival: Sequence[Sequence[float]]) -> list[int]:
        """See ``DraftPolicy``."""
        del coming
        return [next((k for k, p in enumerate(row) if p < self._floor), len(row)) for row in survival]

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        """Nothing is learned."""

    def step_took(self, load: StepLoad, seconds: float) -> None:
        """Nothing is learned."""

    def finished(self, request_id: str) -> None:
        """Nothing is kept."""
