"""Where learned step times are kept between starts, and what they are the times of."""

import hashlib
from pathlib import Path

from server.hardware import cpu_model_and_flags, usable_cores
from server.settings import Settings


def step_times_identity(settings: Settings, target: Path, drafter: Path, kernels: str) -> str:
    """Everything that the time of a step depends on, in words.

    Args:
        settings: of the run.
        target: its folder.
        drafter: its folder.
        kernels: what tells one build of the compiled kernels from another.
    """
    model, engine, speculation = settings.model, settings.engine, settings.speculation
    parts = {
        "target": _digest(target / "config.json"),
        "drafter": _digest(drafter / "config.json"),
        "numbers": f"{model.dtype} {model.weight_format}",
        "cpu": f"{usable_cores()} x {cpu_model_and_flags()[0]}",
        "kernels": f"{kernels} {engine.instruction_set}",
        "batch": f"{engine.max_num_seqs} {engine.max_num_batched_tokens} {engine.block_size}",
        "drafts": f"{speculation.max_draft_tokens} {speculation.path} {speculation.beam_width}",
        "passes": str(speculation.max_passes),
    }
    return ", ".join(f"{name} {value}" for name, value in parts.items())


def step_times_file(cache_dir: Path, identity: str) -> Path:
    """The file of the step times of ``identity``."""
    return cache_dir / "step-times" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
