"""Finding and loading the compiled kernels."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
BUILT = Path(__file__).parent / "_build"
CPU_OPERATORS = frozenset({"block_attention", "partition_block", "write_context", "append_block"})
CUDA_OPERATORS = frozenset({"block_attention"})


@dataclass(frozen=True, slots=True)
class LoadedLibrary:
    """A compiled library: the ``operators`` it registered and, for people, what it is or why there is none."""

    operators: frozenset[str]
    description: str


def fingerprint() -> str:
    """Changes with the sources and with torch, so that a library built from others is never loaded."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(p for p in SOURCES.rglob("*") if p.is_file()):
        digest.update(path.relative_to(SOURCES).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def library_path(device: str) -> Path:
    """Where ``cuda_ext.build`` puts the library of ``cpu`` or ``cuda``."""
    return BUILT / f"slipstream_{device}-{fingerprint()}.so"


def load(device: str) -> LoadedLibrary:
    """Load the kernels of ``cpu`` or ``cuda`` if they were built from these sources and can run here."""
    if device == "cuda" and not torch.version.cuda:
        return LoadedLibrary(frozenset(), "this torch has no CUDA")
    path = library_path(device)
    if not path.exists():
        older = any(BUILT.glob(f"slipstream_{device}-*.so"))
        reason = "built from other sources" if older else "not built"
        return LoadedLibrary(frozenset(), f"{reason}; run: python -m cuda_ext.build {device}")
    torch.ops.load_library(str(path))
    if device == "cuda":
        return LoadedLibrary(CUDA_OPERATORS, "compiled")
    return LoadedLibrary(CPU_OPERATORS, f"compiled, using {torch.ops.slipstream.cpu_isa()}")
