"""Typed extensions of what vLLM's worker and scheduler processes exchange."""

from dataclasses import dataclass, field

from vllm.v1.outputs import DraftTokenIds


@dataclass
class SurvivalDraftTokenIds(DraftTokenIds):
    """Draft tokens with, per token, the estimated probability that it and all before it are accepted."""

    survival: list[list[float]] = field(default_factory=list)
