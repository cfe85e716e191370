"""The recorded drafts of one or several traces as arrays, with what is known of their acceptance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bench.errors import BenchError
from scheduler.policy import Source
from scheduler.recording import SOURCES
from scheduler.trace import DraftRecord, Trace

__all__ = ["Drafts", "calibrate", "drafts_of", "truncate"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_BINS = 10
_LEAST_LABELS = 50  # of a bin: with fewer, its frequency says more of chance than of the drafter


@dataclass(frozen=True, slots=True)
class Drafts:
    """N drafts of R requests, those of a request one after the other in the order in which they were made.

    Attributes:
        slots: longest draft, tokens.
        firsts: ``[R]`` index of each request's first draft.
        counts: ``[R]`` drafts of each request, at least one.
        prompts: ``[R]`` tokens before each request's first draft.
        lengths: ``[R]`` tokens that each request emitted in the trace.
        survival: ``[N, slots]`` as offered, 0 behind the end of a draft.
        offered: ``[N]`` tokens of each draft.
        sources: ``[N]`` of ``scheduler.policy.Source``.
        accepted: ``[N]`` tokens that are accepted if enough are verified.
        acceptance: ``[N, slots]`` probability that a token and all before it are accepted: known, or calibrated.
    """

    slots: int
    firsts: Integers
    counts: Integers
    prompts: Integers
    lengths: Integers
    survival: Floats
    offered: Integers
    sources: Integers
    accepted: Integers
    acceptance: Floats

    @property
    def outcomes(self) -> Floats:
        """``[N, slots]`` 1 where a token and all before it are accepted, else 0."""
        return (np.arange(self.slots) < self.accepted[:, None]).astype(np.float64)


def truncate(trace: Trace) -> Trace:
    """A trace with all drafts cut to what was verified of them, so that all outcomes are known.

    All of them are cut, since a cut of those alone whose outcome is not known would tell it.
    """
    cut = [
        replace(draft, survival=tuple(survival[: draft.verified] for survival in draft.survival))
        for draft in trace.drafts
    ]
    return replace(trace, drafts=[draft for draft in cut if draft.offered])


def drafts_of(traces: Sequence[tuple[str, Trace]]) -> Drafts:
    """The drafts of traces, which may come from different runs with the same drafter.

    Only the source that was verified is kept of each draft: what would have become of the other is not known.

    Args:
        traces: with the name of each, which messages use.

    Raises:
        BenchError: a trace has other sources than the policies know, or there are no drafts.
    """
    requests: dict[tuple[int, str], list[DraftRecord]] = {}
    for number, (name, trace) in enumerate(traces):
        if trace.header.sources != SOURCES:
            raise BenchError(f"{name}: its sources are {list(trace.header.sources)}, expected {list(SOURCES)}")
        for draft in trace.drafts:
            if draft.offered:
                requests.setdefault((number, draft.request), []).append(draft)
    if not requests:
        raise BenchError(f"{', '.join(name for name, _ in traces)}: no drafts, nothing can be replayed")
    groups = list(requests.values())
    flat = [draft for group in groups for draft in group]
    slots = max(trace.header.slots for _, trace in traces)
    counts = np.array([len(group) for group in groups], dtype=np.int64)
    survival = np.zeros((len(flat), slots))
    for row, draft in zip(survival, flat, strict=True):
        row[: draft.offered] = draft.survival[draft.source]
    return calibrate(
        Drafts(
            slots=slots,
            firsts=np.cumsum(counts) - counts,
            counts=counts,
            prompts=np.array([group[0].context for group in groups], dtype=np.int64),
            lengths=np.array([sum(draft.accepted + 1 for draft in group) for group in groups], dtype=np.int64),
            survival=survival,
            offered=np.array([draft.offered for draft in flat], dtype=np.int64),
            sources=np.array([draft.source for draft in flat], dtype=np.int64),
            accepted=np.array([draft.accepted for draft in flat], dtype=np.int64),
            acceptance=np.zeros_like(survival),
        )
    )


def calibrate(drafts: Drafts) -> Drafts:
    """The same with ``acceptance`` estimated from the outcomes.

    Tokens that were reached (all before them were accepted) are grouped by source and slot, and within these by
    their confidence into up to ten bins of equally many, at least fifty each. The probability of each, given those
    before it, is the frequency in its bin, with one success and one failure added: the bins are read in the sample
    that they were made from.
    """
    before = np.hstack([np.ones((len(drafts.survival), 1)), drafts.survival[:, :-1]])
    confidence = np.divide(drafts.survival, before, out=np.zeros_like(before), where=before > 0)
    conditional = np.zeros_like(confidence)
    for source in Source:
        for slot in range(drafts.slots):
            there = (drafts.sources == source) & (drafts.offered > slot)
            reached = there & (drafts.accepted >= slot)
            values = confidence[reached, slot]
            edges = _edges(values)
            numbers = np.searchsorted(edges, values, side="right")
            labels = np.bincount(numbers, minlength=len(edges) + 1)
            accepted = np.bincount(numbers, (drafts.accepted > slot)[reached], minlength=len(edges) + 1)
            frequency = (accepted + 1) / (labels + 2)
            conditional[there, slot] = frequency[np.searchsorted(edges, confidence[there, slot], side="right")]
    return replace(drafts, acceptance=np.cumprod(conditional, axis=1))


def _edges(values: Floats) -> Floats:
    """Inner edges of bins with about equally many of the values."""
    bins = min(_BINS, len(values) // _LEAST_LABELS)
    if bins < 2:
        return np.empty(0)
    return np.unique(np.quantile(values, np.arange(1, bins) / bins))
