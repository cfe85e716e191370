"""Drafts whose true acceptance probabilities are known, as a trace and as what a replay reads."""

from dataclasses import replace

import numpy as np

from bench.simulate_drafts import Drafts, drafts_of
from scheduler.recording import SOURCES
from scheduler.trace import DraftRecord, Trace, TraceHeader


def synthetic_trace(requests: int, drafts: int, slots: int, right: float, seed: int = 0) -> tuple[Trace, np.ndarray]:
    """A trace of a drafter that is too sure of itself, verified to the end, and the truth about it.

    Args:
        requests: that it holds.
        drafts: of each request.
        slots: tokens of each draft.
        right: median probability that a token is accepted, given those before it.
        seed: of everything.

    Returns:
        The trace, and ``[requests * drafts, slots]`` true probabilities that tokens and all before them are accepted.
    """
    random = np.random.default_rng(seed)
    log_odds = np.log(right / (1 - right)) + random.normal(0, 0.5, (requests, 1, 1))
    log_odds = log_odds + random.normal(0, 1.0, (requests, drafts, slots)) - 0.1 * np.arange(slots)
    truth = np.cumprod(1 / (1 + np.exp(-log_odds)), axis=2).reshape(-1, slots)
    claimed = np.cumprod(1 / (1 + np.exp(-log_odds - 0.5)), axis=2).reshape(-1, slots)
    # One draw a draft decides how far it is accepted: the first token whose survival falls below it is rejected.
    accepted = (truth > random.random((len(truth), 1))).sum(axis=1)
    records = []
    for row, (survival, good) in enumerate(zip(claimed.tolist(), accepted.tolist(), strict=True)):
        request, number = divmod(row, drafts)
        records.append(DraftRecord(f"r{request}", 0.01 * row, 100 + 3 * number, (tuple(survival), ()), 0, slots, good))
    header = TraceHeader(slots, SOURCES, "a target", "a drafter", f"fixed:{slots}")
    return Trace(header, records), truth


def synthetic_drafts(requests: int, drafts: int, slots: int, right: float, seed: int = 0) -> Drafts:
    """The same for a replay, with the true probabilities in ``acceptance``."""
    trace, truth = synthetic_trace(requests, drafts, slots, right, seed)
    return replace(drafts_of([("synthetic", trace)]), acceptance=truth)
