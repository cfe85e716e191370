"""What the scheduler's process counts must reach the front end as it was, through vLLM's own messages."""

import warnings

import pytest

from scheduler.counters import SpeculationHistory, SpeculationSnapshot
from scheduler.ledger import SpeculationLedger
from scheduler.policy import Source

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn of their own accord
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from scheduler.vllm_metrics import SpeculationStatLogger
    from scheduler.vllm_types import attach_speculation, take_speculation


@pytest.fixture
def snapshot() -> SpeculationSnapshot:
    ledger = SpeculationLedger(3)
    ledger.drafted(Source.DRAFTER, 3)
    ledger.admitted("a", Source.DRAFTER, 3, [0.75, 0.5, 0.25])
    ledger.verified("a", 2, 1)
    ledger.admitted("b", Source.REPETITION, 1, [0.5])
    ledger.verified("b", 1, 1)
    ledger.verified("c", 0, 0)
    ledger.step_took(0.125, 0.25)
    ledger.judged(0.5, {Source.DRAFTER: 0.25})
    ledger.planned([1])
    ledger.drafter_works(False)
    return ledger.snapshot()


def sent(stats: SchedulerStats) -> SchedulerStats:
    """``stats`` as the front end gets them from the engine's process."""
    message = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    return MsgpackDecoder(EngineCoreOutputs).decode(message).scheduler_stats


def test_a_snapshot_survives_the_way_between_the_processes(snapshot: SpeculationSnapshot) -> None:
    stats = SchedulerStats(num_running_reqs=2)
    attach_speculation(stats, snapshot)
    arrived = sent(stats)
    assert arrived.num_running_reqs == 2
    assert take_speculation(arrived) == snapshot


def test_a_snapshot_is_taken_once_and_leaves_nothing_for_vllms_loggers(snapshot: SpeculationSnapshot) -> None:
    stats = SchedulerStats()
    attach_speculation(stats, snapshot)
    assert take_speculation(stats) is snapshot  # within one process it is not copied
    assert stats.kv_connector_stats is None
    assert take_speculation(stats) is None


def test_a_connectors_statistics_stay(snapshot: SpeculationSnapshot) -> None:
    stats = SchedulerStats(kv_connector_stats={"transfers": 3})
    attach_speculation(stats, snapshot)
    arrived = sent(stats)
    assert take_speculation(arrived) == snapshot
    assert arrived.kv_connector_stats == {"transfers": 3}
    assert take_speculation(arrived) is None and arrived.kv_connector_stats == {"transfers": 3}


def test_the_stat_logger_takes_over_what_a_step_brings(snapshot: SpeculationSnapshot) -> None:
    history = SpeculationHistory()
    logger = SpeculationStatLogger(None, history=history)
    stats = SchedulerStats()
    attach_speculation(stats, snapshot)
    logger.record(sent(stats), None)
    assert history.latest == snapshot
    logger.record(SchedulerStats(), None)
    logger.record(None, None)
    assert history.latest == snapshot
