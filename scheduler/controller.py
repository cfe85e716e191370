"""How many draft tokens a step verifies, and whether the drafter runs at all; pure, no engine needed.

A verified draft token costs time whether it is accepted or not, and what it costs depends on the load: next to nothing
while a step is bound by reading the weights, its full share once it is bound by arithmetic. So draft tokens of all
requests compete for a step together. They are admitted in the order of the probability that they are reached and
accepted, for as long as expected emitted tokens per second rise, as in DSpark (arXiv 2607.05147); none at all is a
legal answer. To trim by what the drafter said of a token that is then not verified does not touch the distribution
here: what the target draws depends on seed, position and its own logits, never on what was drafted.

Whether drafting is worth its own time is judged by what recent drafts would have brought to the coming batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from scheduler.cost import StepLoad
from scheduler.recent_drafts import RecentDrafts

Floats = npt.NDArray[np.float64]

# Drafting is not judged before there are so many drafts to judge by: a single one says little.
_LEAST_EVIDENCE = 8
# Steps without drafting after which one request is drafted for, to see whether it would pay again.
_PROBE_INTERVAL = 24
# Steps for which a judgement on drafting holds, unless the number of requests changes by more than an eighth: judging
# takes time itself.
_JUDGEMENT_STEPS = 8
_MANY_REQUESTS = 64  # with whom it takes three times as long as usual until the next judgement


class StepCost(Protocol):
    """What the controller asks of ``scheduler.cost.CostModel``."""

    def seconds_by_tokens(self, tokens: npt.NDArray[np.int64], rest: StepLoad) -> Floats:
        """Seconds of steps of so many tokens, otherwise like ``rest``."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """How a step is filled.

    Attributes:
        admitted: draft tokens to verify per request.
        emitted: tokens that the step emits on expectation.
        seconds: that it is expected to take, prompts aside.
    """

    admitted: list[int]
    emitted: float
    seconds: float


def choose(survival: Floats, load: StepLoad, cost: StepCost) -> Choice:
    """The draft tokens with which a step emits most tokens per second on expectation.

    The time that prompts take is left out: it is the same whatever is admitted, and spread over it a useless token
    would seem to cost nothing. What a row costs beside them is not.

    Args:
        survival: ``[requests, slots]`` probabilities that a draft token and all before it are accepted, falling along
            each request, 0 where there is no draft token.
        load: the step without draft tokens; every request emits one token in any case.
        cost: of steps.
    """
    candidates = survival[survival > 0]
    candidates[::-1].sort()
    seconds = _seconds(len(candidates), len(survival), load, cost)
    (count,), (emitted,), (took,) = _fill(candidates[None], len(survival), seconds)
    return Choice(_first(survival, candidates, int(count)), float(emitted), float(took))


def _seconds(candidates: int, requests: int, load: StepLoad, cost: StepCost) -> Floats:
    """``[candidates + 1]`` seconds of a step with so many draft tokens, the prompts' share left out."""
    seconds = cost.seconds_by_tokens(load.tokens + np.arange(candidates + 1), load)
    if load.tokens > requests > 0:
        alone = float(cost.seconds_by_tokens(np.array([requests]), load)[0])
        seconds = seconds - max(float(seconds[0]) - alone, 0.0)
    return seconds


def _fill(candidates: Floats, requests: int, seconds: Floats) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """How many candidates of each of several steps emit most per second; the tokens emitted then and the seconds.

    Args:
        candidates: ``[steps, candidates]``, likeliest first.
        requests: that emit one token in any case.
        seconds: ``[candidates + 1]`` of a step with so many of them.
    """
    emitted = np.empty((len(candidates), len(seconds)))
    emitted[:, 0] = requests
    np.cumsum(candidates, axis=1, out=emitted[:, 1:])
    emitted[:, 1:] += requests
    best = np.argmax(emitted / seconds, axis=1)
    return best, emitted[np.arange(len(best)), best], seconds[best]


def _first(survival: Floats, candidates: Floats, count: int) -> list[int]:
    """Draft tokens per request among the ``count`` likeliest of all; of equal ones those of earlier requests."""
    if count == 0:
        return [0] * len(survival)
    least = candidates[count - 1]
    admitted = (survival > least).sum(axis=1)
    equal = (survival == least).sum(axis=1)
    left = count - int(admitted.sum())
    taken = np.minimum(equal, np.maximum(left - (equal.cumsum() - equal), 0))
    result: list[int] = (admitted + taken).tolist()
    return result


def _rate(batches: Floats, seconds: Floats) -> float:
    """Tokens per second over steps that are each filled as ``choose`` would.

    Args:
        batches: ``[steps, requests, slots]`` survival.
        seconds: ``[requests * slots + 1]`` of a step with so many draft tokens.
    """
    steps, requests, slots = batches.shape
    candidates = np.sort(batches.reshape(steps, requests * slots), axis=1)[:, ::-1]
    _, emitted, took = _fill(candidates, requests, seconds)
    return float(emitted.sum() / took.sum())


def _lengths(reach: int) -> list[int]:
    """Lengths to compare, up to ``reach``: all of the short ones, some of the long ones."""
    return [length for length in range(1, reach + 1) if length <= 4 or length % 2 == 0 or length == reach]


class DraftController:
    """Fills steps with draft tokens and says for whom to draft next.

    Args:
        cost: of steps.
        slots: longest draft.
        least: draft tokens that are verified at least, as far as they were drafted; from then on drafting never stops.
    """

    def __init__(self, cost: StepCost, slots: int, least: int = 0):
        self._cost, self._slots, self._least = cost, slots, least
        self._recent = RecentDrafts()
        self._steps = 0
        self._undrafted_steps = 0
        self._probing = False
        self._judging = False
        self._judged_requests = 0
        self._judged_length = 0
        self._judged_drafts = 0  # step of the latest draft that it rests on
        self._judgement_steps = 0

    def admit(self, survival: Floats, drafted: Mapping[str, Floats], load: StepLoad) -> Choice:
        """Choose what the next step verifies.

        Args:
            survival: see ``choose``.
            drafted: ``[slots]`` survival of what was drafted, by request; 0 where something better was found for
                nothing. Whether to draft for coming steps is judged by it.
            load: see ``choose``.
        """
        for request_id, row in drafted.items():
            self._recent.add(self._steps, request_id, row)
        choice = choose(survival, load, self._cost)
        least = 1 if self._probing else self._least
        if least == 0:
            return choice
        counts = (survival > 0).sum(axis=1)
        admitted = np.maximum(choice.admitted, np.minimum(counts, least))
        return replace(choice, admitted=admitted.tolist())

    def plan(self, request_ids: Sequence[str], load: StepLoad) -> list[int]:
        """Longest drafts that are worth computing at the end of a step, for the step behind it.

        Args:
            request_ids: that can be drafted for.
            load: of the step behind it without draft tokens; what it says of drafting is ignored.
        """
        requests = len(request_ids)
        if requests == 0:
            return []
        self._probing = False
        self._steps += 1
        evidence = self._recent.count(self._steps)
        self._judging |= evidence >= _LEAST_EVIDENCE
        length = self._judged(request_ids, load) if self._judging and evidence else self._slots
        if length or self._least:
            self._undrafted_steps = 0
            return [max(length, self._least)] * requests
        self._undrafted_steps += 1
        if self._undrafted_steps < _PROBE_INTERVAL:
            return [0] * requests
        self._undrafted_steps = 0
        self._probing = True
        return [self._slots] + [0] * (requests - 1)

    def finished(self, request_id: str) -> None:
        """Forget a request."""
        self._recent.finished(request_id)

    def _judged(self, request_ids: Sequence[str], load: StepLoad) -> int:
        """``_worthwhile_length``, as of some steps ago."""
        self._judgement_steps -= 1
        changed = abs(len(request_ids) - self._judged_requests) > self._judged_requests // 8
        # Without drafts there is nothing new to judge by.
        settled = self._judged_length == 0 and self._judged_drafts == self._recent.latest
        if changed or (self._judgement_steps <= 0 and not settled):
            self._judged_requests, self._judged_drafts = len(request_ids), self._recent.latest
            self._judgement_steps = _JUDGEMENT_STEPS * (3 if len(request_ids) >= _MANY_REQUESTS else 1)
            self._judged_length = self._worthwhile_length(request_ids, load)
        return self._judged_length

    def _worthwhile_length(self, request_ids: Sequence[str], load: StepLoad) -> int:
        """The length of drafts with which most tokens a second come out, 0 if drafting costs more than it brings."""
        requests = len(request_ids)
        plain = replace(load, drafted_requests=0, drafted_slots=0)
        without = float(self._cost.seconds_by_tokens(np.array([requests]), plain)[0])
        best, best_rate = 0, requests / without
        batches = self._recent.batches(self._steps, request_ids)
        reach = int(batches.any(axis=(0, 1)).sum())
        for length in _lengths(reach):
            drafting = replace(load, drafted_requests=requests, drafted_slots=length * requests)
            times = _seconds(length * requests, requests, drafting, self._cost)
            rate = _rate(batches[:, :, :length], times)
            if rate > best_rate:
                best, best_rate = length, rate
        # Where the longest drafts that were tried are the best ones, longer ones may be better still.
        return min(best + 1, self._slots) if best == reach > 0 else best
