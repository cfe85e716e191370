"""What the engine's worker and scheduler processes need to know; travels in vLLM's ``additional_config``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ADDITIONAL_CONFIG_KEY = "slipstream"


@dataclass(frozen=True, slots=True)
class DrafterOptions:
    """Draft with the block-diffusion checkpoint in ``checkpoint``.

    ``max_draft_tokens`` caps the drafted block; ``survival_floor`` is the estimated probability of being reached
    below which a drafted slot is not worth a row of the verify pass.
    """

    checkpoint: Path
    max_draft_tokens: int
    survival_floor: float


@dataclass(frozen=True, slots=True)
class RecorderOptions:
    """Draft nothing and record the hidden states of ``layers`` into the corpus ``folder``."""

    folder: Path
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which proposer the engine runs; neither means plain decoding."""

    drafter: DrafterOptions | None = None
    recorder: RecorderOptions | None = None

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
            DrafterOptions(Path(drafter["checkpoint"]), drafter["max_draft_tokens"], drafter["survival_floor"])
            if drafter
            else None,
            RecorderOptions(Path(recorder["folder"]), tuple(recorder["layers"])) if recorder else None,
        )
