"""Typed extensions of what vLLM's worker and scheduler processes exchange."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds

from scheduler.counters import SpeculationSnapshot

_STATS_KEY = "slipstream"


@dataclass
class SurvivalDraftTokenIds(DraftTokenIds):
    """Draft tokens with, per token, the estimated probability that it and all before it are accepted.

    ``late_seconds`` of the step went into what earlier ones had put off.
    """

    survival: list[list[float]] = field(default_factory=list)
    late_seconds: float = 0.0


@dataclass
class DraftingSchedulerOutput(SchedulerOutput):
    """What to run, and what the proposer has to know.

    Attributes:
        private_requests: the new requests whose text must not show in the drafts of others.
        draft_lengths: longest draft worth computing behind this step, by request; of others, any length.
    """

    private_requests: frozenset[str] = frozenset()
    draft_lengths: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, output: SchedulerOutput, private_requests: frozenset[str], draft_lengths: Mapping[str, int]
    ) -> "DraftingSchedulerOutput":
        """``output`` with what belongs to it."""
        return cls(**vars(output), private_requests=private_requests, draft_lengths=draft_lengths)


def attach_speculation(stats: SchedulerStats, snapshot: SpeculationSnapshot) -> None:
    """Let a step's statistics carry a snapshot from the scheduler's process to the front end.

    Between the processes vLLM decodes statistics to the classes that it declares: a subclass of ``SpecDecodingStats``
    arrives as its base, without our fields. ``kv_connector_stats`` is declared as a dictionary of anything, meant for
    what plug-ins of the scheduler measure. Without such a connector it is unused, and ``SpeculationStatLogger``, the
    first of the loggers, empties it again.

    Args:
        stats: of the step.
        snapshot: must not be changed any more; another thread sends it.
    """
    stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), _STATS_KEY: snapshot}


def take_speculation(stats: SchedulerStats) -> SpeculationSnapshot | None:
    """The snapshot that ``attach_speculation`` put there, which is gone afterwards; ``None`` if there is none.

    Raises:
        msgspec.ValidationError: what is there is no snapshot.
    """
    attached = stats.kv_connector_stats
    if not attached or _STATS_KEY not in attached:
        return None
    plain = attached[_STATS_KEY]
    stats.kv_connector_stats = {key: value for key, value in attached.items() if key != _STATS_KEY} or None
    return plain if isinstance(plain, SpeculationSnapshot) else msgspec.convert(plain, SpeculationSnapshot)
