"""The server's own policy against the best policy without foresight, on drafts of known quality."""

from functools import cache

import pytest

from bench.simulate_costs import GpuCost, Workload, find_gpu
from bench.simulate_drafts import Drafts
from bench.simulate_policies import Machine, find_policies
from bench.simulate_replay import ClosedLoop, Replay, Span
from scheduler.oracle import Oracle
from scheduler.policy import DraftPolicy
from tests.bench.synthetic_drafts import synthetic_drafts

SLOTS = 7
# The time of a small drafter hardly matters: what is tried is how many tokens are verified. That of a large one makes
# the length of drafts matter as well.
SMALL, LARGE = (
    GpuCost(find_gpu("H100"), Workload(8e9, parameters, 2, 147_456, 0.7, 0.001, 0.0002)) for parameters in (0.1e9, 1e9)
)


@cache
def drafts(right: float) -> Drafts:
    return synthetic_drafts(100, 30, SLOTS, right)


def rate(policy: DraftPolicy, cost: GpuCost, right: float, concurrency: int) -> float:
    known = drafts(right)
    span = Span(150, max(100, 2000 // concurrency))
    measured = Replay(known, cost, policy, known.acceptance, ClosedLoop(concurrency), 0.05, 0).run(span)
    return measured.tokens / measured.seconds


@pytest.mark.parametrize("cost", [SMALL, LARGE], ids=["small drafter", "large drafter"])
@pytest.mark.parametrize("right", [0.5, 0.75])
@pytest.mark.parametrize("concurrency", [1, 16, 96, 192, 512])
def test_a_calibrated_adaptive_policy_is_within_5_percent_of_the_expected_oracle(
    concurrency: int, right: float, cost: GpuCost
) -> None:
    (adaptive,) = find_policies("adaptive:calibrated", SLOTS, "1=1")
    best = rate(Oracle(cost, SLOTS), cost, right, concurrency)
    assert rate(adaptive.make(Machine(cost, 512, 150, 0.05)), cost, right, concurrency) >= 0.95 * best
