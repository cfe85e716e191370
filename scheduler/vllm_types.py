"""Typed extensions of what vLLM's worker and scheduler processes exchange."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds


@dataclass
class SurvivalDraftTokenIds(DraftTokenIds):
    """Draft tokens with, per token, the estimated probability that it and all before it are accepted."""

    survival: list[list[float]] = field(default_factory=list)


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
