"""Where the scheduler writes down what became of drafts; pure, no engine needed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from scheduler.counters import SpeculationCounts, SpeculationSnapshot, SpeculationState
from scheduler.policy import Source

_JUDGEMENT_STEPS = 64


class SpeculationLedger:
    """Counts drafted, verified, accepted and emitted tokens apart, whatever happens to a draft on its way.

    A draft can be trimmed when it is chosen, by a grammar, or by the room of a step, and dropped with a preempted
    request. So it is counted when it is verified, with its length of that moment; the choice is only remembered until
    then.

    Args:
        slots: longest draft, tokens.
    """

    def __init__(self, slots: int):
        self._counts = SpeculationCounts.of_slots(slots)
        self._state = SpeculationState()
        self._chosen: dict[str, tuple[Source, Sequence[float]]] = {}
        self._unjudged = 0

    def planned(self, lengths: Sequence[int]) -> None:
        """The longest drafts worth computing behind the coming step, per request that decodes in it."""
        if lengths:
            self._state.drafting = any(lengths)

    def drafted(self, source: Source, tokens: int) -> None:
        """A source proposed so many draft tokens."""
        self._counts.sources[source].drafted_tokens += tokens

    def admitted(self, request_id: str, source: Source, tokens: int, survival: Sequence[float] = ()) -> None:
        """A request's draft was chosen for the coming step; replaces what was chosen for it before.

        Args:
            request_id: whose.
            source: of the draft.
            tokens: that were chosen; 0 if there is no draft.
            survival: ``[tokens]`` probabilities, as they were believed, that the draft tokens ``0..k`` are all
                accepted; empty if nobody estimates them.
        """
        if tokens:
            self._chosen[request_id] = source, survival
        else:
            self._chosen.pop(request_id, None)

    def verified(self, request_id: str, verified: int, accepted: int, ended: bool = False) -> None:
        """A request made a decode step, which emitted ``accepted`` tokens and one more.

        Args:
            request_id: whose.
            verified: its draft tokens in the step, 0 to ``slots``.
            accepted: draft tokens that were accepted and reached the client.
            ended: the answer ended with this step, so that accepted tokens may have been cut off.

        Raises:
            ValueError: not 0 <= accepted <= verified <= slots.
        """
        source, survival = self._chosen.pop(request_id, (Source.DRAFTER, ()))
        counts = self._counts.sources[source]
        if not 0 <= accepted <= verified < len(counts.verified_lengths):
            raise ValueError(
                f"{accepted} accepted of {verified} verified draft tokens of request {request_id}; each must be at "
                f"most the next, and the last at most {len(counts.verified_lengths) - 1}"
            )
        if verified == 0:
            self._counts.undrafted_steps += 1
            return
        counts.verified_lengths[verified] += 1
        counts.accepted_lengths[accepted] += 1
        if not ended and len(survival) >= verified:
            counts.expected_tokens += float(sum(survival[:verified]))
            counts.realised_tokens += accepted

    def finished(self, request_id: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._chosen.pop(request_id, None)

    def step_took(self, seconds: float, predicted: float | None = None) -> None:
        """An engine step took ``seconds``; ``predicted`` is what the cost model had said before, if there is one."""
        self._counts.steps += 1
        self._counts.measured_seconds += seconds
        self._counts.predicted_seconds += predicted or 0.0
        self._unjudged += 1

    @property
    def judgement_due(self) -> bool:
        """Whether it is time to call ``judged`` again: what that takes is too slow for every step."""
        return self._unjudged >= _JUDGEMENT_STEPS

    def judged(self, step_time_error: float, calibration_errors: Mapping[Source, float]) -> None:
        """How wrong the models are.

        Args:
            step_time_error: relative error of predicted step times; NaN before the first.
            calibration_errors: of predicted acceptance, 0 to 1, of the sources with an acceptance model.
        """
        self._unjudged = 0
        self._state.step_time_error = None if step_time_error != step_time_error else float(step_time_error)
        for source, error in calibration_errors.items():
            self._state.calibration_errors[source] = float(error)

    def drafter_works(self, healthy: bool) -> None:
        """Whether the drafter does its work."""
        self._state.drafter_healthy = healthy

    def snapshot(self) -> SpeculationSnapshot:
        """An independent copy of everything, in plain numbers."""
        state = replace(self._state, calibration_errors=list(self._state.calibration_errors))
        return SpeculationSnapshot(self._counts.copy(), state)
