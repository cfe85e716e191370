"""How many draft tokens to compute and to verify, and from which source; pure, no engine needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from scheduler.cost import StepLoad


class Source(IntEnum):
    """Where draft tokens come from: the drafter, or a place where the request's own text repeats itself."""

    DRAFTER = 0
    REPETITION = 1


@dataclass(frozen=True, slots=True)
class ComingStep:
    """A step that is about to be scheduled, apart from draft tokens.

    Attributes:
        request_ids: that decode in it, each at least one token.
        context_lens: of each, tokens.
        prompt_tokens: of prompts that the step will read besides.
        draft_limits: of each, the most draft tokens that may be verified; none means that there is no such limit.
    """

    request_ids: Sequence[str]
    context_lens: Sequence[int]
    prompt_tokens: int = 0
    draft_limits: Sequence[int] = ()

    def limit(self, row: int) -> int | None:
        """The most draft tokens of the request in this row; ``None`` without a limit."""
        return self.draft_limits[row] if self.draft_limits else None


@dataclass(frozen=True, slots=True)
class Offer:
    """The drafts of one request, at most one of each source.

    Attributes:
        survival: per source, estimates of the probability that draft tokens ``0..k`` are all accepted. They fall along
            each draft, and are empty where the source has none.
    """

    survival: tuple[Sequence[float], Sequence[float]] = ((), ())

    @property
    def expected(self) -> Source:
        """The source that promises more accepted tokens."""
        drafted, repeated = map(sum, self.survival)
        return Source.REPETITION if repeated > drafted else Source.DRAFTER


@dataclass(frozen=True, slots=True)
class Admission:
    """What is verified of one request: the first ``tokens`` of one source's draft.

    Attributes:
        survival: ``[tokens]`` probabilities, as the policy believes them, that draft tokens ``0..k`` are all accepted;
            empty if it has no belief.
    """

    tokens: int = 0
    source: Source = Source.DRAFTER
    survival: Sequence[float] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class ModelErrors:
    """How wrong a policy's models were lately.

    Attributes:
        step_time: median relative error of predicted step times; NaN if nothing was predicted.
        calibration: by source, mean distance of predicted from observed acceptance, 0 to 1.
    """

    step_time: float = math.nan
    calibration: Mapping[Source, float] = field(default_factory=dict)


class DraftPolicy(Protocol):
    """Decides for the whole batch, step by step, and is told what came of it."""

    def plan(self, coming: ComingStep) -> list[int]:
        """Longest draft worth computing for each request, while the step before the coming one still runs."""
        ...

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        """Draft tokens to verify per request of the coming step, never more than are offered."""
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

    def predicted_seconds(self, load: StepLoad) -> float | None:
        """How long a step should take; ``None`` from a policy that does not know."""
        ...

    def errors(self) -> ModelErrors:
        """How wrong it was lately; too slow for every step."""
        ...


class LearningNothing:
    """What a ``DraftPolicy`` that keeps no memory does with what it is told."""

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        """Nothing is learned."""

    def step_took(self, load: StepLoad, seconds: float) -> None:
        """Nothing is learned."""

    def finished(self, request_id: str) -> None:
        """Nothing is kept."""

    def predicted_seconds(self, load: StepLoad) -> float | None:
        """Nothing is predicted."""
        return None

    def errors(self) -> ModelErrors:
        """Nothing can be wrong."""
        return ModelErrors()


class PolicyAround:
    """A ``DraftPolicy`` that leaves everything to ``inner``, for others to change some of it."""

    def __init__(self, inner: DraftPolicy):
        self.inner = inner

    def plan(self, coming: ComingStep) -> list[int]:
        """See ``DraftPolicy``."""
        return self.inner.plan(coming)

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        """See ``DraftPolicy``."""
        return self.inner.admit(coming, offers)

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        """See ``DraftPolicy``."""
        self.inner.verified(request_id, verified, accepted)

    def step_took(self, load: StepLoad, seconds: float) -> None:
        """See ``DraftPolicy``."""
        self.inner.step_took(load, seconds)

    def finished(self, request_id: str) -> None:
        """See ``DraftPolicy``."""
        self.inner.finished(request_id)

    def predicted_seconds(self, load: StepLoad) -> float | None:
        """See ``DraftPolicy``."""
        return self.inner.predicted_seconds(load)

    def errors(self) -> ModelErrors:
        """See ``DraftPolicy``."""
        return self.inner.errors()


class SurvivalFloor(LearningNothing):
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

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        """See ``DraftPolicy``."""
        del coming
        return [self._likely(offer.survival[offer.expected], offer.expected) for offer in offers]

    def _likely(self, survival: Sequence[float], source: Source) -> Admission:
        tokens = next((k for k, p in enumerate(survival) if p < self._floor), len(survival))
        return Admission(tokens, source, survival[:tokens])
