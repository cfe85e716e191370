import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bench.simulate_costs import GpuCost, ReplayCost, Workload, find_gpu
from bench.simulate_drafts import Drafts, drafts_of
from bench.simulate_policies import Machine, find_policies
from bench.simulate_replay import Arrivals, ClosedLoop, Measured, PoissonArrivals, Replay, Span
from scheduler.cost import StepLoad
from scheduler.fixed_policies import FixedLength
from scheduler.oracle import Oracle
from scheduler.policy import Admission, ComingStep, DraftPolicy, Offer, Source
from scheduler.recording import SOURCES, RecordingPolicy
from scheduler.trace import DraftRecord, Trace, TraceHeader, TraceWriter, read_trace
from tests.bench.synthetic_drafts import synthetic_drafts

SLOTS = 3
H100 = GpuCost(find_gpu("H100"), Workload(8e9, 0.5e9, 2, 147_456, 0.7, 0.001, 0.0005))


class Cost:
    """A step takes 1 s, each token past the first of a request 0.25 s, each drafted slot 0.125 s."""

    assumptions: Mapping[str, Any] = {}

    def seconds_by_tokens(self, tokens: npt.NDArray[np.int64], rest: StepLoad) -> npt.NDArray[np.float64]:
        return 1 + 0.125 * rest.drafted_slots + 0.25 * (tokens - rest.requests).astype(np.float64)


class Spy(FixedLength):
    """Writes down everything it meets."""

    def __init__(self, length: int):
        super().__init__(length)
        self.planned: list[ComingStep] = []
        self.offered: list[list[Offer]] = []
        self.told: list[tuple[Any, ...]] = []

    def plan(self, coming: ComingStep) -> list[int]:
        self.planned.append(coming)
        return super().plan(coming)

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        self.offered.append(list(offers))
        return super().admit(coming, offers)

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        self.told.append((request_id, verified, accepted))

    def step_took(self, load: StepLoad, seconds: float) -> None:
        self.told.append((load, seconds))

    def finished(self, request_id: str) -> None:
        self.told.append((request_id,))


def recorded(*drafts: tuple[Source, int, int]) -> Drafts:
    """One request whose drafts have these sources, offered tokens and accepted ones."""
    records = []
    for number, (source, offered, accepted) in enumerate(drafts):
        survival = tuple(0.9 - 0.01 * number for _ in range(offered))
        both = (survival, ()) if source is Source.DRAFTER else ((), survival)
        records.append(DraftRecord("a", 0, 10 + number, both, source, offered, accepted))
    return drafts_of([("made up", Trace(TraceHeader(SLOTS, SOURCES, "t", "d", "fixed:3"), records))])


def replay(drafts: Drafts, policy: DraftPolicy, arrivals: Arrivals, cost: ReplayCost | None = None) -> Replay:
    return Replay(drafts, cost or Cost(), policy, drafts.acceptance, arrivals, noise=0.0, seed=3)


class FromTheStart(ClosedLoop):
    """Requests that are met at their first token."""

    at_once = False


def test_steps_are_told_in_the_engines_order() -> None:
    drafts = recorded((Source.DRAFTER, 3, 2), (Source.DRAFTER, 3, 0), (Source.DRAFTER, 2, 1))  # 6 tokens
    spy = Spy(2)
    measured = replay(drafts, spy, FromTheStart(1)).run(Span(0, 4))
    first = "0.0"
    assert [[offer.survival[0] for offer in offers] for offers in spy.offered] == [
        [[0.89, 0.89]],
        [[0.88, 0.88]],
        [[0.9]],  # two tokens are left of six, so one may be drafted
        [[0.9, 0.9]],  # of the request behind it
    ]
    assert spy.told == [
        (first, 0, 0),
        (StepLoad(1, 1, 10, 1, 2), 1.25),
        (first, 2, 0),
        (StepLoad(3, 1, 11, 1, 2), 1.75),
        (first, 2, 1),
        (StepLoad(3, 1, 12, 1, 2), 1.75),
        (first,),
        (StepLoad(2, 1, 14, 1, 2), 1.5),
    ]
    assert [list(coming.draft_limits) for coming in spy.planned] == [[3], [3], [3], [1]]
    assert spy.planned[-1].request_ids == [first]
    assert (measured.seconds, measured.tokens, measured.request_steps) == (6.25, 6, 4)
    assert (measured.verified, measured.accepted) == (5, 2)
    assert measured.per_token.tolist() == [6.25 / 6] and measured.request_tokens.tolist() == [6]


def test_a_request_ends_with_the_length_that_it_had() -> None:
    drafts = recorded((Source.DRAFTER, 3, 3), (Source.DRAFTER, 3, 2))  # 7 tokens
    spy = Spy(0)
    measured = replay(drafts, spy, FromTheStart(1)).run(Span(0, 21))
    assert [told for told in spy.told if len(told) == 1] == [("0.0",), ("0.1",), ("0.2",)]
    assert measured.tokens == 21 and measured.seconds == 21
    assert measured.request_tokens.tolist() == [7, 7, 7]


def test_what_repeats_itself_is_offered_whatever_was_planned() -> None:
    drafts = recorded((Source.DRAFTER, 3, 1), (Source.REPETITION, 3, 1), (Source.DRAFTER, 3, 1))

    class Never(Spy):
        def plan(self, coming: ComingStep) -> list[int]:
            return [0] * len(coming.request_ids)

    spy = Never(3)
    measured = replay(drafts, spy, FromTheStart(1)).run(Span(0, 2))
    assert spy.offered == [[Offer(([], [0.89] * 3))], [Offer(([], []))]]
    assert measured.verified == 3 and measured.accepted == 1


def test_only_what_was_planned_is_offered_of_the_drafter() -> None:
    drafts = recorded(*[(Source.DRAFTER, 3, 3)] * 9)
    spy = Spy(1)
    replay(drafts, spy, FromTheStart(1)).run(Span(0, 3))
    assert [[len(offer.survival[0]) for offer in offers] for offers in spy.offered] == [[1], [1], [1]]


def test_admitting_more_than_is_offered_is_found_out() -> None:
    class Greedy(FixedLength):
        def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
            return [Admission(4)] * len(offers)

    with pytest.raises(ValueError, match="Greedy admits more than is offered"):
        replay(recorded((Source.DRAFTER, 3, 3)), Greedy(3), ClosedLoop(1)).run(Span(0, 1))


def test_the_warm_up_is_not_counted() -> None:
    drafts = synthetic_drafts(5, 10, SLOTS, 0.7)
    measured = replay(drafts, FixedLength(2), ClosedLoop(3)).run(Span(50, 20))
    assert measured.request_steps == 60
    assert measured.tokens == 60 + measured.accepted == measured.request_tokens.sum()
    assert measured.seconds == pytest.approx(20 * (1 + 0.125 * 6) + 0.25 * measured.verified)


def test_a_load_stays_and_may_rise_to_what_it_is() -> None:
    drafts = synthetic_drafts(5, 10, SLOTS, 0.7)
    spy = Spy(1)
    replay(drafts, spy, ClosedLoop(4)).run(Span(0, 30))
    assert {len(coming.request_ids) for coming in spy.planned} == {4}
    assert all(len(set(coming.request_ids)) == 4 for coming in spy.planned)
    spy = Spy(1)
    replay(drafts, spy, ClosedLoop(4, ramp=9)).run(Span(0, 12))
    assert [len(coming.request_ids) for coming in spy.planned] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_a_lasting_load_is_met_in_the_middle_of_answers() -> None:
    drafts = synthetic_drafts(50, 20, SLOTS, 0.7)
    spy = Spy(0)
    replay(drafts, spy, ClosedLoop(50)).run(Span(0, 1))
    (coming,) = spy.planned
    emitted = np.array(coming.context_lens) - drafts.prompts[[int(name.split(".")[0]) for name in coming.request_ids]]
    assert 0.3 < (emitted / drafts.lengths.mean()).mean() < 0.7


def test_random_arrivals_come_at_their_rate_and_wait_for_a_place() -> None:
    arrivals = PoissonArrivals(rate=2.0, most=1_000_000, seed=1)
    assert arrivals.ready(1000.0, 0) == pytest.approx(2000, abs=150)
    assert arrivals.ready(1000.0, 0) == 0 and arrivals.next_arrival() > 1000
    arrivals = PoissonArrivals(rate=2.0, most=5, seed=1)
    assert [arrivals.ready(1000.0, running) for running in (0, 5, 3)] == [5, 0, 2]


def test_at_a_low_rate_the_clock_waits_for_requests() -> None:
    drafts = recorded((Source.DRAFTER, 3, 1))  # 2 tokens
    measured = replay(drafts, FixedLength(0), PoissonArrivals(0.01, 8, 0)).run(Span(20, 400))
    assert measured.tokens / measured.seconds == pytest.approx(2 * 0.01, rel=0.2)
    assert measured.latency(0.5) == 1.0


def test_replays_with_one_seed_are_equal_and_others_differ() -> None:
    drafts = synthetic_drafts(20, 10, SLOTS, 0.7)

    def run(seed: int) -> Measured:
        (policy,) = find_policies("adaptive", SLOTS, "1=1")
        made = policy.make(Machine(H100, 8, 100, 0.05))
        return Replay(drafts, H100, made, drafts.acceptance, ClosedLoop(8), 0.05, seed).run(Span(20, 30))

    first, second, third = run(1), run(1), run(2)
    assert (first.seconds, first.tokens, first.verified) == (second.seconds, second.tokens, second.verified)
    assert first.per_token.tolist() == second.per_token.tolist()
    assert first.seconds != third.seconds


def test_progress_goes_from_step_to_step() -> None:
    told: list[float] = []
    replay(recorded((Source.DRAFTER, 3, 1)), FixedLength(1), ClosedLoop(1)).run(Span(1, 3), told.append)
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_latencies_are_of_tokens() -> None:
    measured = Measured(1.0, 10, 10, 0, 0, np.array([0.3, 0.1, 0.2]), np.array([1, 6, 3]))
    assert [measured.latency(quantile) for quantile in (0.5, 0.6, 0.61, 0.9, 0.95)] == [0.1, 0.1, 0.2, 0.2, 0.3]
    assert [measured.within(objective) for objective in (0.05, 0.1, 0.25, 1.0)] == [0, 6, 9, 10]


def test_a_recorded_replay_can_be_replayed(tmp_path: Path) -> None:
    drafts = synthetic_drafts(20, 30, SLOTS, 0.7)
    header = TraceHeader(SLOTS, SOURCES, "t", "d", "fixed:3")
    recording = RecordingPolicy(FixedLength(SLOTS), TraceWriter(tmp_path / "trace", header), time.monotonic)
    replay(drafts, recording, ClosedLoop(10)).run(Span(0, 300))
    recording.close()
    trace = read_trace(tmp_path / "trace")
    again = drafts_of([("again", trace)])
    assert trace.censored == 0 and 2500 < len(trace.drafts) < 3000
    whole = again.offered == SLOTS  # a request's last drafts are cut to what it can still emit
    assert whole.mean() > 0.9
    assert again.outcomes[whole].mean() == pytest.approx(drafts.outcomes.mean(), abs=0.03)


def rate(drafts: Drafts, policy: DraftPolicy, concurrency: int, truth: npt.NDArray[np.float64] | None = None) -> float:
    known = drafts.acceptance if truth is None else truth
    measured = Replay(drafts, H100, policy, known, ClosedLoop(concurrency), 0.05, 0).run(Span(100, 200))
    return measured.tokens / measured.seconds


@pytest.mark.parametrize("concurrency", [4, 96, 256])
def test_no_fixed_length_beats_the_expected_oracle_and_that_not_the_clairvoyant_one(concurrency: int) -> None:
    drafts = synthetic_drafts(100, 30, 5, 0.75)
    expected = rate(drafts, Oracle(H100, 5), concurrency)
    best = max(rate(drafts, FixedLength(length), concurrency) for length in range(6))
    clairvoyant = rate(drafts, Oracle(H100, 5), concurrency, drafts.outcomes)
    assert best <= 1.005 * expected and expected <= 1.005 * clairvoyant
    if concurrency == 96:  # between no limit and nothing but limits there is something to choose
        assert best < 0.97 * expected and expected < 0.9 * clairvoyant


def test_an_oracle_that_is_told_nonsense_is_worse() -> None:
    drafts = synthetic_drafts(100, 30, 5, 0.75)
    shuffled = np.random.default_rng(0).permutation(drafts.acceptance)
    assert rate(drafts, Oracle(H100, 5), 96, shuffled) < 0.97 * rate(drafts, Oracle(H100, 5), 96)


def test_drafts_are_met_equally_often_whatever_the_policy() -> None:
    drafts = synthetic_drafts(3, 7, SLOTS, 0.7)
    longer = replace(drafts, lengths=np.full(3, 7 * (SLOTS + 1) * 10))
    spies = [Spy(1), Spy(3)]
    for spy in spies:
        replay(longer, spy, FromTheStart(1)).run(Span(0, 70))
    first, second = ([offers[0].survival[0][0] for offers in spy.offered] for spy in spies)
    assert first == second
    assert first[:7] == first[7:14] and len(set(first)) == 7
