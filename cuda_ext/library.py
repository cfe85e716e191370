"""Finding and loading the compiled kernels."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
BUILD_DESCRIPTION = Path(__file__).parent / "CMakeLists.txt"
BUILT = Path(__file__).parent / "_build"


@dataclass(frozen=True, slots=True)
class LoadedLibrary:
    """Whether a compiled library was ``found`` and, for people, what it is or why there is none."""

    found: bool
    description: str


def fingerprint(device: str) -> str:
    """Changes with the sources for ``device`` and with torch, so that a library built from others is never loaded."""
    digest = hashlib.sha256(torch.__version__.encode())
    sources = [path for folder in ("common", device) for path in (SOURCES / folder).rglob("*") if path.is_file()]
    for path in [BUILD_DESCRIPTION, *sorted(sources)]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def library_path(device: str) -> Path:
    """Where ``cuda_ext.build`` puts the library of ``cpu`` or ``cuda``."""
    return BUILT / f"slipstream_{device}-{fingerprint(device)}.so"


def load(device: str) -> LoadedLibrary:
    """Load the kernels of ``cpu`` or ``cuda`` if they were built from these sources and can run here."""
    if device == "cuda" and not torch.version.cuda:
        return LoadedLibrary(False, "this torch has no CUDA")
    path = library_path(device)
    if not path.exists():
        older = any(BUILT.glob(f"slipstream_{device}-*.so"))
        reason = "built from other sources or for another torch" if older else "not built"
        return LoadedLibrary(False, f"the library was {reason}; run: python -m cuda_ext.build {device}")
    torch.ops.load_library(str(path))
    if device == "cuda":
        return LoadedLibrary(True, "never run by this project: no GPU was available")
    return LoadedLibrary(True, f"instruction set {torch.ops.slipstream.cpu_isa()}")
