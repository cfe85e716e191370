"""What the engine's worker and scheduler processes need to know; travels in vLLM's ``additional_config``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from drafter.options import PathSearch, ProposalOptions

ADDITIONAL_CONFIG_KEY = "slipstream"
_POLICY_FILES = ("cost_file", "trace_file")


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


class PolicyName(StrEnum):
    """How draft lengths are chosen.

    ``ADAPTIVE``: what pays at the present load. ``FLOOR``: what is likely enough to be reached. ``FIXED``: everything.
    """

    ADAPTIVE = "adaptive"
    FLOOR = "floor"
    FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """How draft tokens are chosen from what is offered.

    Attributes:
        name: of the policy.
        min_draft_tokens: that ``ADAPTIVE`` verifies in any case, as far as they were drafted.
        survival_floor: with ``FLOOR``, the probability of being reached from which a token is verified.
        repetition: draft from the request's own text too.
        cost_file: where ``ADAPTIVE`` keeps what it learned of step times; ``None`` forgets it.
        cost_identity: what these times depend on, so that those of another machine or model are never taken for them.
        calibrate: learn step times from steps of the engine's own before the first request, where none are known.
        trace_file: where every draft and how it fared is recorded; ``None`` records nothing.
    """

    name: PolicyName = PolicyName.ADAPTIVE
    min_draft_tokens: int = 0
    survival_floor: float = 0.0
    repetition: bool = True
    cost_file: Path | None = None
    cost_identity: str = ""
    calibrate: bool = False
    trace_file: Path | None = None


@dataclass(frozen=True, slots=True)
class DrafterOptions:
    """Draft with the block-diffusion checkpoint in ``checkpoint``."""

    checkpoint: Path
    proposal: ProposalOptions
    policy: PolicyOptions = PolicyOptions()


@dataclass(frozen=True, slots=True)
class RecorderOptions:
    """Draft nothing and record the hidden states of ``layers`` into the corpus ``folder``."""

    folder: Path
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which proposer the engine runs, neither meaning plain decoding, and how it holds the target's weights.

    Attributes:
        instruction_set: of the CPU kernels; ``auto`` is the best that the processor has.
        statistics: the front end listens to our part of the statistics; others could not read it.
    """

    drafter: DrafterOptions | None = None
    recorder: RecorderOptions | None = None
    weights: TargetWeights = TargetWeights.EXACT
    instruction_set: str = "auto"
    statistics: bool = False

    def to_additional_config(self) -> dict[str, Any]:
        """A JSON-serialisable form that ``from_additional_config`` reads back."""
        plain = asdict(self)
        if self.drafter:
            plain["drafter"]["checkpoint"] = str(self.drafter.checkpoint)
            policy = plain["drafter"]["policy"]
            policy |= {name: str(policy[name]) for name in _POLICY_FILES if policy[name]}
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
            plain.get("statistics", False),
        )


def _drafter(plain: Mapping[str, Any]) -> DrafterOptions:
    return DrafterOptions(Path(plain["checkpoint"]), _proposal(plain["proposal"]), _policy(plain["policy"]))


def _policy(plain: Mapping[str, Any]) -> PolicyOptions:
    files = {name: Path(plain[name]) for name in _POLICY_FILES if plain[name]}
    return PolicyOptions(**{**plain, **files, "name": PolicyName(plain["name"])})


def _proposal(plain: Mapping[str, Any]) -> ProposalOptions:
    return ProposalOptions(**{**plain, "path": PathSearch(plain["path"])})
