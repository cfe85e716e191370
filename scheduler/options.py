"""What the engine's worker and scheduler processes need to know; travels in vLLM's ``additional_config``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from drafter.options import PathSearch, ProposalOptions

ADDITIONAL_CONFIG_KEY = "slipstream"


class TargetWeights(StrEnum):
    """How the target's weights are held for our CPU kernel; has no effect elsewhere or in other formats than float32.

    ``EXACT``: per layer the smallest format that holds the very same numbers. ``FLOAT32``: as they are loaded.
    ``BFLOAT16`` and ``INT8`` round them, which changes the model. ``VLLM``: leave the layers to vLLM's kernels.
    """

    EXACT = "exact"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    VLLM = "vllm"

    @property
    def changes_model(self) -> bool:
        """Whether the answers are those of a rounded model."""
        return self in (TargetWeights.BFLOAT16, TargetWeights.INT8)


@dataclass(frozen=True, slots=True)
class DrafterOptions:
    """Draft with the block-diffusion checkpoint in ``checkpoint``.

    Attributes:
        min_draft_tokens: verified in any case, as far as they were drafted.
        survival_floor: instead of following acceptance and load, verify what is at least this likely to be reached.
    """

    checkpoint: Path
    proposal: ProposalOptions
    min_draft_tokens: int = 0
    survival_floor: float | None = None


@dataclass(frozen=True, slots=True)
class RecorderOptions:
    """Draft nothing and record the hidden states of ``layers`` into the corpus ``folder``."""

    folder: Path
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which proposer the engine runs, neither meaning plain decoding, and how it holds the target's weights.

    ``instruction_set`` names that of the CPU kernels; ``auto`` is the best that the processor has.
    """

    drafter: DrafterOptions | None = None
    recorder: RecorderOptions | None = None
    weights: TargetWeights = TargetWeights.EXACT
    instruction_set: str = "auto"

    def to_additional_config(self) -> dict[str, Any]:
        """A JSON-serialisable form that ``from_additional_config`` reads back."""
        plain = asdict(self)
        if self.drafter:
            plain["drafter"]["checkpoint"] = str(self.drafter.checkpoint)
        if self.recorder:
            plain["recorder"]["folder"] = str(self.recorder.folder)
        return {ADDITIONAL_CONFIG_KEY: plain}

    @classmethod
    def from_additional_config(cls, config: Mapping[str, Any]) -> "EngineOptions":
        """Rebuild the options in a worker process."""
        plain = config.get(ADDITIONAL_CONFIG_KEY, {})
        drafter, recorder = plain.get("drafter"), plain.get("recorder")
        return cls(
            _drafter(drafter) if drafter else None,
            RecorderOptions(Path(recorder["folder"]), tuple(recorder["layers"])) if recorder else None,
            TargetWeights(plain.get("weights", TargetWeights.EXACT)),
            plain.get("instruction_set", "auto"),
        )


def _drafter(plain: Mapping[str, Any]) -> DrafterOptions:
    return DrafterOptions(
        **{**plain, "checkpoint": Path(plain["checkpoint"]), "proposal": _proposal(plain["proposal"])}
    )


def _proposal(plain: Mapping[str, Any]) -> ProposalOptions:
    return ProposalOptions(**{**plain, "path": PathSearch(plain["path"])})
