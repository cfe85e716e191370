"""A draft policy that writes down what another one is offered, what it verifies and what becomes of it; pure."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from scheduler.policy import Admission, ComingStep, DraftPolicy, Offer, PolicyAround, Source
from scheduler.trace import DraftRecord, TraceError, TraceWriter

_log = logging.getLogger(__name__)

SOURCES = tuple(source.name.lower() for source in Source)
"""What ``TraceHeader.sources`` has to be."""


class RecordingPolicy(PolicyAround):
    """Decides like ``inner`` and appends every draft of which the outcome becomes known to a trace.

    Tokens beyond a request's draft limit are not recorded: nobody can learn what would have become of them. Recording
    never stops serving: when the trace cannot be written any further, that is logged once and recording ends.

    Args:
        inner: the policy that decides; nothing may change its admissions afterwards. For a trace whose outcomes are
            all known it has to verify all that it is offered, as ``FixedLength`` of the longest draft does.
        writer: of the trace; ``close`` closes it.
        clock: seconds, from any origin; the trace starts now.
    """

    def __init__(self, inner: DraftPolicy, writer: TraceWriter, clock: Callable[[], float]):
        super().__init__(inner)
        self._clock = clock
        self._writer: TraceWriter | None = writer
        self._started = clock()
        self._pending: dict[str, tuple[int, tuple[tuple[float, ...], ...], Source]] = {}

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        """See ``DraftPolicy``."""
        admissions = super().admit(coming, offers)
        if self._writer is not None:
            self._remember(coming, offers, admissions)
        return admissions

    def _remember(self, coming: ComingStep, offers: Sequence[Offer], admissions: Sequence[Admission]) -> None:
        for row, (request_id, offer, admission) in enumerate(zip(coming.request_ids, offers, admissions, strict=True)):
            limit = coming.limit(row)
            survival = tuple(tuple(each[:limit]) for each in offer.survival)
            if any(survival):
                # Where nothing is verified, the source says nothing; the one that promised more is then the draft.
                source = admission.source if admission.tokens else offer.expected
                self._pending[request_id] = coming.context_lens[row], survival, source
            else:
                self._pending.pop(request_id, None)

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        """See ``DraftPolicy``."""
        super().verified(request_id, verified, accepted)
        drafted = self._pending.pop(request_id, None)
        if drafted is None or self._writer is None:
            return
        context, survival, source = drafted
        record = DraftRecord(
            request_id, self._clock() - self._started, context, survival, int(source), verified, accepted
        )
        try:
            self._writer.write(record)
        except TraceError as error:
            _log.warning("%s; nothing is recorded from here on", error)
            self._pending.clear()
            with suppress(TraceError):
                self.close()

    def finished(self, request_id: str) -> None:
        """See ``DraftPolicy``."""
        self._pending.pop(request_id, None)
        super().finished(request_id)

    def close(self) -> None:
        """Close the trace.

        Raises:
            TraceError: what is left cannot be written.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
