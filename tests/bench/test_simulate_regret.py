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

SLOTS = 5
# With a drafter this small its time hardly matters: what is tried is how many tokens are verified.
COST = GpuCost(find_gpu("H100"), Workload(8e9, 0.1e9, 2, 147_456, 0.7, 0.001, 0.0002))


@cache
def drafts(right: float) -> Drafts:
    return synthetic_drafts(100, 30, SLOTS, right)


def rate(policy: DraftPolicy, right: float, concurrency: int) -> float:
    known = drafts(right)
    span = Span(150, max(100, 2000 // concurrency))
    measured = Replay(known, COST, policy, known.acceptance, ClosedLoop(concurrency), 0.05, 0).run(span)
    return measured.tokens / measured.seconds


@pytest.mark.parametrize("right", [0.4, 0.8])
@pytest.mark.parametrize("concurrency", [1, 16, 128, 512])
def test_a_calibrated_adaptive_policy_is_within_5_percent_of_the_expected_oracle(
    concurrency: int, right: float
) -> None:
    (adaptive,) = find_policies("adaptive:calibrated", SLOTS, "1=1")
    best = rate(Oracle(COST, SLOTS), right, concurrency)
    assert rate(adaptive.make(Machine(COST, 512, 150, 0.05)), right, concurrency) >= 0.95 * best
