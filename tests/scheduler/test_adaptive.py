"""Acceptance model, cost model and controller together, on a made-up machine and drafter."""

import numpy as np
import pytest

from scheduler.adaptive import AdaptivePolicy
from scheduler.cost import StepLoad
from scheduler.policy import ComingStep

SLOTS = 4


class World:
    """A machine whose rows cost nothing up to a knee, and a drafter whose tokens are right with a known probability."""

    def __init__(self, policy: AdaptivePolicy, right: float, seed: int = 0):
        self.policy, self.right = policy, right
        self._random = np.random.default_rng(seed)
        self.seconds = 0.0
        self.tokens = 0
        self.verified = 0

    def run(self, steps: int, requests: int) -> float:
        """Tokens per second of so many steps."""
        self.seconds, self.tokens, self.verified = 0.0, 0, 0
        coming = ComingStep([f"r{i}" for i in range(requests)], [100] * requests)
        admitted = [0] * requests
        for _ in range(steps):
            plan = self.policy.plan(coming)
            rows = requests + sum(admitted)
            drafts = [length for length in plan if length]
            load = StepLoad(rows, requests, 100 * requests, len(drafts), sum(drafts))
            seconds = time_of(rows, len(drafts))
            for name, count in zip(coming.request_ids, admitted, strict=True):
                accepted = int(np.cumprod(self._random.random(count) < self.right).sum())
                self.tokens += 1 + accepted
                if count:
                    self.policy.verified(name, count, accepted)
            self.seconds += seconds
            self.verified += sum(admitted)
            self.policy.step_took(load, seconds * float(self._random.lognormal(0, 0.05)))
            survival = [np.cumprod(np.full(length, 0.6)).tolist() for length in plan]
            admitted = self.policy.admit(coming, survival)
        return self.tokens / self.seconds


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
    world = World(AdaptivePolicy(SLOTS, 0, 512), right)
    world.run(300, requests)
    assert world.run(600, requests) >= 0.95 * best_fixed(right, requests)


def test_a_drafter_that_breaks_is_left_alone_and_taken_back_when_it_recovers() -> None:
    world = World(AdaptivePolicy(SLOTS, 0, 512), 0.8)
    world.run(300, 2)
    world.right = 0.0
    world.run(200, 2)
    assert world.run(300, 2) >= 0.95 * best_fixed(0.0, 2)
    world.right = 0.8
    world.run(300, 2)
    assert world.run(300, 2) >= 0.95 * best_fixed(0.8, 2)


def test_requests_that_end_leave_nothing_behind() -> None:
    policy = AdaptivePolicy(SLOTS, 0, 512)
    World(policy, 0.5).run(20, 3)
    for name in ("r0", "r1", "r2", "unknown"):
        policy.finished(name)
    coming = ComingStep([], [])
    assert policy.plan(coming) == [] and policy.admit(coming, []) == []


def test_a_floor_is_verified_whatever_it_brings() -> None:
    world = World(AdaptivePolicy(SLOTS, 2, 512), 0.0)
    world.run(100, 4)
    assert world.verified >= 99 * 4 * 2
