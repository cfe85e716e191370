"""Draft lengths that follow acceptance and load: acceptance models, cost model and controller as one policy; pure."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scheduler.acceptance import AcceptanceModel
from scheduler.controller import DraftController
from scheduler.cost import CostModel, StepLoad
from scheduler.policy import Admission, ComingStep, ModelErrors, Offer, Source

_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]

# A repetition whose verified tokens are this likely to be accepted all is expected to go on in the step behind.
_GOES_ON = 0.5
# Of steps that are alike only some are learned from, once the cost model is no longer young, and of all steps once it
# is old: learning takes time too.
_LEARN_INTERVAL, _YOUNG, _OLD = 4, 100, 2000
_PREDICTION_STEPS = 8  # for which a predicted step time holds, as long as steps are alike: their context grows slowly


class AdaptivePolicy:
    """Implements ``scheduler.policy.DraftPolicy``.

    Each source of drafts has an acceptance model of its own. Per request and step the source that promises more
    accepted tokens competes for the step, see ``scheduler.controller``.

    Args:
        slots: longest draft.
        least: draft tokens that are verified at least.
        cost: of steps; learns on.
    """

    def __init__(self, slots: int, least: int, cost: CostModel):
        self.acceptance = {source: AcceptanceModel(slots) for source in Source}
        self.cost = cost
        self._slots = slots
        self._controller = DraftController(self.cost, slots, least)
        self._planned: list[int] = []
        self._offered: dict[str, dict[Source, tuple[_Floats, int]]] = {}
        self._admitted: dict[str, Source] = {}
        self._repeating: set[str] = set()
        self._kind, self._alike = (0, 0), 0
        self._predicted = (0, 0, 0, 0), 0.0
        self._prediction_steps = 0

    def plan(self, coming: ComingStep) -> list[int]:
        """See ``DraftPolicy``."""
        free = [row for row, request_id in enumerate(coming.request_ids) if self._may_draft(coming, row, request_id)]
        lengths = self._controller.plan([coming.request_ids[row] for row in free], _load(coming, []))
        self._planned = [0] * len(coming.request_ids)
        for row, length in zip(free, lengths, strict=True):
            limit = coming.limit(row)
            self._planned[row] = length if limit is None else min(length, limit)
        return self._planned

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        """See ``DraftPolicy``."""
        self._repeating.clear()
        survival = [self._calibrated(coming, offers, source) for source in Source]
        if not any(rows.any() for rows in survival):
            return [Admission()] * len(offers)
        drafted, repeated = survival
        takes_repetition = repeated.sum(axis=1) > drafted.sum(axis=1)
        best = np.where(takes_repetition[:, None], repeated, drafted)
        gains = {
            coming.request_ids[row]: drafted[row] * (not takes_repetition[row])
            for row, offer in enumerate(offers)
            if offer.survival[Source.DRAFTER]
        }
        choice = self._controller.admit(best, gains, _load(coming, self._planned))
        admissions = [
            Admission(tokens, source, row[:tokens].tolist())
            for tokens, source, row in zip(choice.admitted, map(Source, takes_repetition.tolist()), best, strict=True)
        ]
        for request_id, admission, row in zip(coming.request_ids, admissions, best, strict=True):
            self._admitted[request_id] = admission.source
            if admission.source is Source.REPETITION and admission.tokens and row[admission.tokens - 1] > _GOES_ON:
                self._repeating.add(request_id)
        return admissions

    def reserve(self, coming: ComingStep) -> list[int]:
        """Draft tokens to keep room for in a step that is scheduled before its drafts are made.

        In place of their probabilities there is what history lets expect; everything else is as in ``admit``.
        """
        lengths = np.array(self.plan(coming), dtype=np.int64)
        context_lens = np.array(coming.context_lens, dtype=np.int64)
        expected = self.acceptance[Source.DRAFTER].expected(coming.request_ids, context_lens, self._slots)
        survival = expected * (np.arange(self._slots) < lengths[:, None])
        drafted = {name: row for name, row, length in zip(coming.request_ids, survival, lengths, strict=True) if length}
        return self._controller.admit(survival, drafted, _load(coming, self._planned)).admitted

    def reserved_verified(self, request_id: str, verified: int, accepted: int, context_len: int) -> None:
        """What became of tokens that were reserved; by then, later ones have been reserved as well."""
        unknown = np.full(verified, np.nan)
        self.acceptance[Source.DRAFTER].observe(request_id, unknown, verified, accepted, context_len)

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        """See ``DraftPolicy``."""
        source = self._admitted.pop(request_id, None)
        offered = self._offered.pop(request_id, {})
        if accepted < verified:
            self._repeating.discard(request_id)
        if source in offered and verified:
            confidences, context_len = offered[source]
            self.acceptance[source].observe(request_id, confidences, verified, accepted, context_len)

    def step_took(self, load: StepLoad, seconds: float) -> None:
        """See ``DraftPolicy``."""
        kind = load.tokens, load.drafted_requests
        self._alike = self._alike + 1 if kind == self._kind or self.cost.observations >= _OLD else 0
        self._kind = kind
        if self._alike % _LEARN_INTERVAL == 0 or self.cost.observations < _YOUNG:
            self.cost.observe(load, seconds)

    def finished(self, request_id: str) -> None:
        """See ``DraftPolicy``."""
        self._offered.pop(request_id, None)
        self._admitted.pop(request_id, None)
        self._repeating.discard(request_id)
        for model in self.acceptance.values():
            model.finished(request_id)
        self._controller.finished(request_id)

    def predicted_seconds(self, load: StepLoad) -> float | None:
        """See ``DraftPolicy``."""
        kind = load.tokens, load.requests, load.drafted_requests, load.drafted_slots
        self._prediction_steps -= 1
        if kind != self._predicted[0] or self._prediction_steps <= 0:
            self._predicted = kind, self.cost.seconds(load)
            self._prediction_steps = _PREDICTION_STEPS
        return self._predicted[1]

    def errors(self) -> ModelErrors:
        """See ``DraftPolicy``."""
        calibration = {source: model.calibration_error for source, model in self.acceptance.items()}
        return ModelErrors(self.cost.error, calibration)

    def _may_draft(self, coming: ComingStep, row: int, request_id: str) -> bool:
        return coming.limit(row) != 0 and request_id not in self._repeating

    def _calibrated(self, coming: ComingStep, offers: Sequence[Offer], source: Source) -> _Floats:
        """``[requests, slots]`` survival of one source's drafts, 0 where there is none."""
        rows = [row for row, offer in enumerate(offers) if offer.survival[source]]
        survival = np.zeros((len(offers), self._slots))
        if not rows:
            self.acceptance[source].skip()
            return survival
        request_ids = [coming.request_ids[row] for row in rows]
        confidences, counts = _conditional([offers[row].survival[source] for row in rows], self._slots)
        context_lens = [coming.context_lens[row] for row in rows]
        survival[rows] = self.acceptance[source].survival(request_ids, confidences, counts, np.array(context_lens))
        for request_id, values, count, context_len in zip(request_ids, confidences, counts, context_lens, strict=True):
            self._offered.setdefault(request_id, {})[source] = values[:count], context_len
        return survival


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


def _conditional(survival: Sequence[Sequence[float]], slots: int) -> tuple[_Floats, _Integers]:
    """``[requests, slots]`` probabilities of single tokens given those before them, and how many there are of each."""
    counts = np.array([min(len(row), slots) for row in survival], dtype=np.int64)
    padded = np.zeros((len(survival), slots + 1))
    padded[:, 0] = 1
    for row, values in zip(padded, survival, strict=True):
        row[1 : 1 + min(len(values), slots)] = values[:slots]
    before, reached = padded[:, :-1], padded[:, 1:]
    return np.divide(reached, before, out=np.zeros_like(reached), where=before > 0), counts
