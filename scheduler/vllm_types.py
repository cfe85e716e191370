"""Typed extensions of what vLLM's worker and scheduler processes exchange."""

from dataclasses import dataclass, field

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds


@dataclass
class SurvivalDraftTokenIds(DraftTokenIds):
    """Draft tokens with, per token, the estimated probability that it and all before it are accepted."""

    survival: list[list[float]] = field(default_factory=list)


@dataclass
class PrivacySchedulerOutput(SchedulerOutput):
    """What to run, with the new requests whose text must not show in the drafts of others."""

    private_requests: frozenset[str] = frozenset()

    @classmethod
    def of(cls, output: SchedulerOutput, private_requests: frozenset[str]) -> "PrivacySchedulerOutput":
        """``output`` with the private ones among its new requests."""
        return cls(**vars(output), private_requests=private_requests)
