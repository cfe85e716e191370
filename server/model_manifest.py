"""The manifest beside a converted model: where it came from and what its files should be."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

MANIFEST = "manifest.json"
_FORMAT = 1
_CHUNK = 1 << 20


def write_manifest(folder: Path, source: Mapping[str, str], versions: Mapping[str, str]) -> None:
    """Describe the files of ``folder`` and make all of them, the manifest included, durable.

    Args:
        folder: a finished model folder.
        source: where the model came from; ``sha256`` is the checksum of the original file.
        versions: packages that made it.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    described = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    content = {"format": _FORMAT, "source": dict(source), "versions": dict(versions), "files": described}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in (*files, manifest):
        path.chmod(0o644)  # safetensors are written for the owner alone
        sync(path)
    sync(folder)


def problems(folder: Path, source_sha256: str, *, thorough: bool) -> list[str]:
    """What is wrong with a converted model; nothing when the list is empty.

    Args:
        folder: the model folder.
        source_sha256: checksum of the original that it should have been made from.
        thorough: compare checksums as well, which reads every byte; otherwise sizes.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["source"]["sha256"] != source_sha256:
            return ["it was made from another file or by another version"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is missing or malformed"]
    found = []
    for name, (size, checksum) in expected.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
        elif thorough and sha256(path) != checksum:
            found.append(f"{name} does not have the checksum that it was written with")
    return found


def sha256(path: Path) -> str:
    """Checksum of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the entries of a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
