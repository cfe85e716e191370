"""Recorded drafts replayed under a policy: a simulation of engine steps, no engine needed.

Every step of a request takes the request's next recorded draft, whether the policy uses it or not, and from the first
one again when they are used up; the request ends when it has emitted as many tokens as in the trace. So all policies
meet the same drafts in the same order, and each draft equally often. The text is not followed: a policy that verifies
less than was recorded meets the next draft earlier in the text than the trace did.

The order of events is the engine's: lengths are planned while a step runs, the drafter runs at its end and is paid
for in it, then come the step's outcomes, then drafts are admitted to the next step. Prompts take no time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bench.simulate_costs import ReplayCost
from bench.simulate_drafts import Drafts
from scheduler.cost import StepLoad
from scheduler.oracle import Oracle
from scheduler.policy import ComingStep, DraftPolicy, Offer, Source

__all__ = ["Arrivals", "ClosedLoop", "Measured", "PoissonArrivals", "Replay", "Span"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_MOST_IDLE_SECONDS = 1e9
_MOST_OFFERS = 200_000  # that are kept: making one takes longer than looking it up


class Arrivals(Protocol):
    """When requests come."""

    at_once: bool
    """Whether the first requests are met in the middle of their answers, as if the load had lasted for long."""

    def ready(self, now: float, running: int) -> int:
        """How many more requests start at ``now`` (seconds), beside so many that run."""
        ...

    def next_arrival(self) -> float:
        """When the next request comes, seconds; asked while none runs."""
        ...


class ClosedLoop:
    """Always the same number of requests: a new one as soon as one ends.

    Args:
        concurrency: requests.
        ramp: steps over which their number rises to that, from one; 0 to start with all of them.
    """

    at_once = True

    def __init__(self, concurrency: int, ramp: int = 0):
        self._concurrency, self._ramp = concurrency, ramp
        self._steps = 0

    def ready(self, now: float, running: int) -> int:
        """See ``Arrivals``; asked once a step."""
        most = self._concurrency
        if self._steps < self._ramp:
            most = 1 + (most - 1) * self._steps // self._ramp
        self._steps += 1
        return max(most - running, 0)

    def next_arrival(self) -> float:
        """Never asked for: some request always runs."""
        return _MOST_IDLE_SECONDS


class PoissonArrivals:
    """Requests come independently of each other and of the server.

    Args:
        rate: requests per second on average.
        most: requests that run at the same time; others wait.
        seed: of the arrivals.
    """

    at_once = False

    def __init__(self, rate: float, most: int, seed: int):
        self._random = np.random.default_rng(seed)
        self._gap, self._most = 1 / rate, most
        self._next = self._random.exponential(self._gap)
        self._waiting = 0

    def ready(self, now: float, running: int) -> int:
        """See ``Arrivals``."""
        while self._next <= now:
            self._waiting += 1
            self._next += self._random.exponential(self._gap)
        started = min(self._waiting, self._most - running)
        self._waiting -= started
        return started

    def next_arrival(self) -> float:
        """See ``Arrivals``."""
        return float(self._next)


@dataclass(frozen=True, slots=True)
class Span:
    """How long a replay lasts.

    Attributes:
        warm_up: steps before anything is counted; policies learn in them.
        steps: that are counted.
    """

    warm_up: int
    steps: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What a replay came to, over its counted steps.

    Attributes:
        seconds: simulated.
        tokens: emitted.
        request_steps: steps times the requests in each.
        verified, accepted: draft tokens.
        per_token: ``[n]`` seconds per token of each request that was met.
        request_tokens: ``[n]`` tokens that each of them emitted.
    """

    seconds: float
    tokens: int
    request_steps: int
    verified: int
    accepted: int
    per_token: Floats
    request_tokens: Integers

    def latency(self, quantile: float) -> float:
        """Seconds per token that this share of the tokens came at or below."""
        order = np.argsort(self.per_token)
        tokens = np.cumsum(self.request_tokens[order])
        return float(self.per_token[order][np.searchsorted(tokens, quantile * tokens[-1])])

    def within(self, objective: float) -> int:
        """Tokens of requests that took at most ``objective`` seconds per token."""
        return int(self.request_tokens[self.per_token <= objective].sum())


class _Running:
    """The requests that run, as arrays; a new one stands last."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.rows = np.empty(0, dtype=np.int64)  # in ``Drafts``
        self.cursors = np.empty(0, dtype=np.int64)  # the step's draft, counted within the request
        self.emitted = np.empty(0, dtype=np.int64)
        self.counted_tokens = np.empty(0, dtype=np.int64)
        self.counted_seconds = np.empty(0)
        self.admitted = np.empty(0, dtype=np.int64)
        self.planned = np.empty(0, dtype=np.int64)

    def add(self, ids: list[str], rows: Integers, cursors: Integers, emitted: Integers, planned: int) -> None:
        nothing = np.zeros(len(ids), dtype=np.int64)
        self.ids = self.ids + ids
        self.rows, self.cursors = np.append(self.rows, rows), np.append(self.cursors, cursors)
        self.emitted, self.admitted = np.append(self.emitted, emitted), np.append(self.admitted, nothing)
        self.counted_tokens = np.append(self.counted_tokens, nothing)
        self.counted_seconds = np.append(self.counted_seconds, nothing.astype(np.float64))
        self.planned = np.append(self.planned, np.full(len(ids), planned))

    def keep(self, kept: npt.NDArray[np.bool_]) -> None:
        self.ids = [request_id for request_id, keep in zip(self.ids, kept.tolist(), strict=True) if keep]
        for name in ("rows", "cursors", "emitted", "counted_tokens", "counted_seconds", "admitted", "planned"):
            setattr(self, name, getattr(self, name)[kept])


class Replay:
    """One policy's way through the drafts. Equal arguments give equal results.

    Args:
        drafts: to be replayed.
        cost: the true cost of steps.
        policy: that decides; ``scheduler.oracle.Oracle`` is told the truth.
        truth: ``[N, slots]`` what an oracle is told of each draft.
        arrivals: of requests.
        noise: relative standard deviation of the step times that the policy is told.
        seed: of the order of requests and of the noise.
    """

    def __init__(
        self,
        drafts: Drafts,
        cost: ReplayCost,
        policy: DraftPolicy,
        truth: Floats,
        arrivals: Arrivals,
        noise: float,
        seed: int,
    ):
        self._drafts, self._cost, self._policy, self._truth = drafts, cost, policy, truth
        self._arrivals, self._noise = arrivals, noise
        self._order, self._noises = (np.random.default_rng([seed, stream]) for stream in (0, 1))
        self._queue: Integers = np.empty(0, dtype=np.int64)
        self._started = 0
        self._offers: dict[tuple[int, int], Offer] = {}
        self._running = _Running()
        self._planned = 0  # the longest draft of the last step
        self._now = 0.0

    def run(self, span: Span, progress: Callable[[float], None] = lambda fraction: None) -> Measured:
        """Replay so many steps.

        Args:
            span: of the replay.
            progress: told the share that is done, 0 to 1, step by step.
        """
        total = span.warm_up + span.steps
        seconds, tokens, request_steps, verified, accepted = 0.0, 0, 0, 0, 0
        done: list[tuple[Floats, Integers]] = []
        self._fill(first=True)
        self._coming = self._next()
        for step in range(total):
            running = self._running
            counted = step >= span.warm_up
            rows = len(running.ids)
            admitted = int(running.admitted.sum())
            took, emitted = self._step()
            if counted:
                seconds, tokens = seconds + took, tokens + int(emitted.sum())
                request_steps, verified = request_steps + rows, verified + admitted
                accepted += int(emitted.sum()) - rows
                running.counted_tokens += emitted
                running.counted_seconds += took
            kept = running.emitted < self._drafts.lengths[running.rows]
            if not kept.all():
                done.append((running.counted_seconds[~kept], running.counted_tokens[~kept]))
                running.keep(kept)
            idle = self._fill()
            seconds += idle if counted else 0.0
            self._admit()
            progress((step + 1) / total)
        done.append((self._running.counted_seconds, self._running.counted_tokens))
        spent, given = (np.concatenate([part[i] for part in done]) for i in (0, 1))
        met = given > 0
        return Measured(
            seconds, tokens, request_steps, verified, accepted, spent[met] / given[met], given[met].astype(np.int64)
        )

    def _next(self) -> ComingStep:
        running, drafts = self._running, self._drafts
        limits = np.minimum(drafts.lengths[running.rows] - running.emitted - 1, drafts.slots)
        contexts = drafts.prompts[running.rows] + running.emitted
        return ComingStep(running.ids, contexts.tolist(), 0, limits.tolist())

    def _step(self) -> tuple[float, Integers]:
        """Run the filled step: its seconds and what each request emitted."""
        running, policy, coming = self._running, self._policy, self._coming
        planned = policy.plan(coming)
        running.planned = np.array(planned, dtype=np.int64)
        self._planned = max(planned)
        load = StepLoad(
            tokens=len(planned) + int(running.admitted.sum()),
            requests=len(planned),
            context_tokens=sum(coming.context_lens),
            drafted_requests=int((running.planned > 0).sum()),
            drafted_slots=int(running.planned.sum()),
        )
        seconds = float(self._cost.seconds_by_tokens(np.array([load.tokens]), load)[0])
        accepted = np.minimum(running.admitted, self._drafts.accepted[self._current()])
        running.emitted = running.emitted + accepted + 1
        running.cursors = running.cursors + 1
        finished = (running.emitted >= self._drafts.lengths[running.rows]).tolist()
        for request_id, ended, tokens, good in zip(
            running.ids, finished, running.admitted.tolist(), accepted.tolist(), strict=True
        ):
            if ended:
                policy.finished(request_id)
            else:
                policy.verified(request_id, tokens, good)
        self._load, self._seconds = load, seconds
        self._now += seconds
        return seconds, accepted + 1

    def _current(self) -> Integers:
        """Index of each running request's draft."""
        drafts, running = self._drafts, self._running
        return drafts.firsts[running.rows] + running.cursors % drafts.counts[running.rows]

    def _admit(self) -> None:
        """Fill the coming step, then tell the policy of the last one, as the engine does."""
        self._coming = self._next()
        coming, running, drafts = self._coming, self._running, self._drafts
        current = self._current()
        if isinstance(self._policy, Oracle):
            limits = np.array(coming.draft_limits)[:, None]
            self._policy.reveal(np.where(np.arange(drafts.slots) < limits, self._truth[current], 0.0))
        repeated = drafts.sources[current] == Source.REPETITION  # such a draft is there whatever was planned
        lengths = np.where(repeated, drafts.slots, running.planned)
        lengths = np.minimum(np.minimum(lengths, drafts.offered[current]), coming.draft_limits)
        offers = [self._offer(*key) for key in zip(current.tolist(), lengths.tolist(), strict=True)]
        admissions = self._policy.admit(coming, offers)
        running.admitted = np.array([admission.tokens for admission in admissions], dtype=np.int64)
        if (running.admitted > lengths).any():
            raise ValueError(f"{type(self._policy).__name__} admits more than is offered")
        noise = self._noises.lognormal(0, self._noise) if self._noise else 1.0
        self._policy.step_took(self._load, self._seconds * noise)

    def _offer(self, draft: int, length: int) -> Offer:
        offer = self._offers.get((draft, length))
        if offer is None:
            if len(self._offers) >= _MOST_OFFERS:
                self._offers.clear()
            survival = self._drafts.survival[draft, :length].tolist()
            offer = Offer(([], survival) if self._drafts.sources[draft] == Source.REPETITION else (survival, []))
            self._offers[draft, length] = offer
        return offer

    def _fill(self, first: bool = False) -> float:
        """Start the requests that have come; waits for one if none runs, and returns for how long."""
        idle = 0.0
        count = self._arrivals.ready(self._now, len(self._running.ids))
        while not self._running.ids and not count:
            idle += max(self._arrivals.next_arrival() - self._now, 0.0)
            self._now = max(self._now, self._arrivals.next_arrival())
            count = self._arrivals.ready(self._now, 0)
        if not count:
            return idle
        while len(self._queue) < count:
            self._queue = np.append(self._queue, self._order.permutation(len(self._drafts.counts)))
        rows, self._queue = self._queue[:count], self._queue[count:]
        ids = [f"{row}.{self._started + i}" for i, row in enumerate(rows.tolist())]
        self._started += count
        emitted = np.zeros(count, dtype=np.int64)
        if first and self._arrivals.at_once:
            emitted = (self._order.random(count) * self._drafts.lengths[rows]).astype(np.int64)
        cursors = emitted * self._drafts.counts[rows] // self._drafts.lengths[rows]
        self._running.add(ids, rows, cursors, emitted, self._planned)
        return idle
