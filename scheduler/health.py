"""Noticing a drafter whose tokens are not accepted at all, whatever the policy; pure, no engine needed."""

from collections import deque
from collections.abc import Sequence

from scheduler.policy import Admission, ComingStep, DraftPolicy, Offer, PolicyAround, Source

# A drafter is given up after so many drafts in a row of which not even the first token was accepted. On text that is
# hard to draft that is rare: at a first-token acceptance of 0.15 one run of this length in 180 comes by chance.
PATIENCE = 32
# And taken back when so many of the latest tries succeeded; in between it is tried every so many steps.
_TRIES, _SUCCESSES, _TRY_INTERVAL = 8, 3, 24


class DrafterHealth:
    """Judges by the first token of each verified draft: it says most, and is verified most often."""

    def __init__(self) -> None:
        self.is_healthy = True
        self._latest: deque[bool] = deque(maxlen=PATIENCE)

    def note(self, verified: int, accepted: int) -> None:
        """A draft of the drafter was verified."""
        if not verified:
            return
        self._latest.append(accepted > 0)
        if self.is_healthy:
            self.is_healthy = len(self._latest) < PATIENCE or any(self._latest)
        else:
            self.is_healthy = sum(list(self._latest)[-_TRIES:]) >= _SUCCESSES


class HealthGuard(PolicyAround):
    """A policy that stops drafting for nothing, and tries again now and then; implements ``DraftPolicy``.

    Args:
        inner: decides as long as the drafter works.
        slots: longest draft.
    """

    def __init__(self, inner: DraftPolicy, slots: int):
        super().__init__(inner)
        self.health = DrafterHealth()
        self._slots = slots
        self._undrafted_steps = 0
        self._admitted: dict[str, Source] = {}

    def plan(self, coming: ComingStep) -> list[int]:
        """See ``DraftPolicy``."""
        planned = super().plan(coming)
        if self.health.is_healthy or not planned:
            return planned
        self._undrafted_steps += 1
        tried = self._tried(coming) if self._undrafted_steps >= _TRY_INTERVAL else None
        if tried is None:
            return [0] * len(planned)
        self._undrafted_steps = 0
        limit = coming.limit(tried)
        planned = [0] * len(planned)
        planned[tried] = self._slots if limit is None else min(self._slots, limit)
        return planned

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        """See ``DraftPolicy``; a try is verified in any case."""
        admissions = super().admit(coming, offers)
        if not self.health.is_healthy:
            for row, offer in enumerate(offers):
                if offer.survival[Source.DRAFTER] and not admissions[row].tokens:
                    admissions[row] = Admission(1, Source.DRAFTER)
        for request_id, admission in zip(coming.request_ids, admissions, strict=True):
            self._admitted[request_id] = admission.source
        return admissions

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        """See ``DraftPolicy``."""
        if self._admitted.pop(request_id, None) is Source.DRAFTER:
            self.health.note(verified, accepted)
        super().verified(request_id, verified, accepted)

    def finished(self, request_id: str) -> None:
        """See ``DraftPolicy``."""
        self._admitted.pop(request_id, None)
        super().finished(request_id)

    def _tried(self, coming: ComingStep) -> int | None:
        """The first request that allows drafts."""
        return next((row for row in range(len(coming.request_ids)) if coming.limit(row) != 0), None)
