"""Acceptance model, cost model and controller together, on a made-up machine and drafter."""

import numpy as np
import pytest

from scheduler.adaptive import AdaptivePolicy
from scheduler.cost import CostModel, StepLoad
from scheduler.policy import Admission, ComingStep, Offer, Source

SLOTS = 4


class World:
    """A machine whose rows cost nothing up to a knee, and drafts that are right with a known probability.

    Attributes:
        right: of the drafter's tokens.
        repeats: of those of a repetition; every request always has one unless it is 0.
        limits: see ``ComingStep``.
    """

    def __init__(self, policy: AdaptivePolicy, right: float, repeats: float = 0.0, seed: int = 0):
        self.policy, self.right, self.repeats = policy, right, repeats
        self.limits: list[int] = []
        self._random = np.random.default_rng(seed)
        self.seconds = 0.0
        self.tokens = 0
        self.verified = dict.fromkeys(Source, 0)
        self.drafted = 0

    def run(self, steps: int, requests: int) -> float:
        """Tokens per second of so many steps."""
        self.seconds, self.tokens, self.drafted = 0.0, 0, 0
        self.verified = dict.fromkeys(Source, 0)
        coming = ComingStep([f"r{i}" for i in range(requests)], [100] * requests, draft_limits=self.limits)
        admitted = [Admission()] * requests
        for _ in range(steps):
            plan = self.policy.plan(coming)
            rows = requests + sum(admission.tokens for admission in admitted)
            drafts = [length for length in plan if length]
            load = StepLoad(rows, requests, 100 * requests, len(drafts), sum(drafts))
            seconds = time_of(rows, len(drafts))
            self.drafted += len(drafts)
            for name, admission in zip(coming.request_ids, admitted, strict=True):
                right = self.repeats if admission.source is Source.REPETITION else self.right
                accepted = int(np.cumprod(self._random.random(admission.tokens) < right).sum())
                self.tokens += 1 + accepted
                self.verified[admission.source] += admission.tokens
                if admission.tokens:
                    self.policy.verified(name, admission.tokens, accepted)
            self.seconds += seconds
            self.policy.step_took(load, seconds * float(self._random.lognormal(0, 0.05)))
            admitted = self.policy.admit(coming, [self._offer(coming, row, plan[row]) for row in range(requests)])
        return self.tokens / self.seconds

    def _offer(self, coming: ComingStep, row: int, drafted: int) -> Offer:
        limit = coming.limit(row)
        slots = SLOTS if limit is None else min(limit, SLOTS)
        repeated = np.cumprod(np.full(slots, 0.8)).tolist() if self.repeats else []
        return Offer((np.cumprod(np.full(min(drafted, slots), 0.6)).tolist(), repeated))


def policy_of(least: int = 0) -> AdaptivePolicy:
    return AdaptivePolicy(SLOTS, least, CostModel(512))


def time_of(rows: int, drafts: int) -> float:
    return 0.010 + 0.002 * max(rows - 4, 0) + (0.002 + 0.0005 * drafts if drafts else 0)


def best_fixed(right: float, requests: int) -> float:
    rates = []
    for length in range(SLOTS + 1):
        emitted = requests * sum(right**k for k in range(length + 1))
        rates.append(emitted / time_of(requests * (1 + length), requests if length else 0))
    return max(rates)


@pytest.mark.parametrize(
    ("right", "requests"), [(0.8, 1), (0.8, 8), (0.5, 1), (0.5, 8), (0.5, 32), (0.02, 1), (0.02, 8)]
)
def test_it_is_as_fast_as_the_best_fixed_length(right: float, requests: int) -> None:
    world = World(policy_of(), right)
    world.run(300, requests)
    assert world.run(600, requests) >= 0.95 * best_fixed(right, requests)


def test_a_drafter_that_breaks_is_left_alone_and_taken_back_when_it_recovers() -> None:
    world = World(policy_of(), 0.8)
    world.run(300, 2)
    world.right = 0.0
    world.run(200, 2)
    assert world.run(300, 2) >= 0.95 * best_fixed(0.0, 2)
    world.right = 0.8
    world.run(300, 2)
    assert world.run(300, 2) >= 0.95 * best_fixed(0.8, 2)


def test_requests_that_end_leave_nothing_behind() -> None:
    policy = policy_of()
    World(policy, 0.5).run(20, 3)
    for name in ("r0", "r1", "r2", "unknown"):
        policy.finished(name)
    coming = ComingStep([], [])
    assert policy.plan(coming) == [] and policy.admit(coming, []) == []


def test_a_floor_is_verified_whatever_it_brings() -> None:
    world = World(policy_of(2), 0.0)
    world.run(100, 4)
    assert world.verified[Source.DRAFTER] >= 99 * 4 * 2


@pytest.mark.parametrize("requests", [1, 8])
def test_text_that_repeats_itself_is_drafted_for_nothing(requests: int) -> None:
    world = World(policy_of(), 0.3, repeats=0.9)
    world.run(300, requests)
    rate = world.run(600, requests)
    assert world.verified[Source.DRAFTER] < 0.1 * world.verified[Source.REPETITION]
    assert world.drafted < 0.2 * 600 * requests  # nothing is drafted behind a repetition that goes on
    free = [requests * sum(0.9**k for k in range(n + 1)) / time_of(requests * (1 + n), 0) for n in range(SLOTS + 1)]
    assert rate >= 0.93 * max(free)


@pytest.mark.parametrize("requests", [1, 8])
def test_repetitions_that_mislead_are_not_verified(requests: int) -> None:
    world = World(policy_of(), 0.8, repeats=0.02)
    world.run(300, requests)
    assert world.run(600, requests) >= 0.95 * best_fixed(0.8, requests)
    assert world.verified[Source.REPETITION] < 0.05 * 600 * requests


def test_requests_that_allow_no_drafts_get_none_and_do_not_stop_those_of_others() -> None:
    world = World(policy_of(), 0.8)
    world.limits = [0, SLOTS]
    world.run(300, 2)
    world.run(300, 2)
    assert world.verified[Source.DRAFTER] > 300 and world.drafted <= 300
