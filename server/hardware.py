"""What the machine has: cores, memory, CPU features and libraries that can be preloaded; no imports of torch."""

import math
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, and the container's CPU quota rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(_CGROUP)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def memory_gib(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> tuple[float, float] | None:
    """Memory in total and available, GiB, no more than the container's limit; ``None`` where it cannot be told."""
    fields = {}
    for line in _read(meminfo).splitlines():
        name, _, rest = line.partition(":")
        fields[name] = rest.split()
    if not {"MemTotal", "MemAvailable"} <= fields.keys():
        return None
    total, available = (int(fields[name][0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    limit = _number(_read(cgroup / "memory.max"))
    used = _number(_read(cgroup / "memory.current"))
    if limit is None or used is None:
        return total, available
    return min(total, limit / 2**30), min(available, (limit - used) / 2**30)


def cpu_model_and_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """The CPU's name and its feature flags as Linux names them; no flags where they cannot be told."""
    model, flags = platform.processor() or platform.machine(), frozenset[str]()
    for line in _read(cpuinfo).splitlines():
        name, _, rest = line.partition(":")
        match name.strip():
            case "model name":
                model = rest.strip()
            case "flags" | "Features":
                flags = frozenset(rest.split())
        if flags:
            break
    return model, flags


def find_openmp(prefix: Path | None = None) -> Path | None:
    """Intel's OpenMP runtime as the package ``intel-openmp`` installs it, which vLLM's CPU kernels run best on."""
    return _first_preloadable([(prefix or Path(sys.prefix)) / "lib" / "libiomp5.so"])


def find_tcmalloc(folders: Sequence[Path] | None = None) -> Path | None:
    """The system's tcmalloc, which does not hand large tensors back to the kernel after every step."""
    if folders is None:
        multiarch = sysconfig.get_config_var("MULTIARCH") or ""
        roots = [Path(root) for root in ("/usr/lib", "/lib", "/usr/lib64", "/usr/local/lib")]
        folders = [root / multiarch for root in roots if multiarch] + roots
    names = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
    return _first_preloadable(folder / name for folder in folders for name in names)


def _first_preloadable(paths: Iterable[Path]) -> Path | None:
    """The first that exists and that ``LD_PRELOAD`` can name: it separates its entries by colons and spaces."""
    return next((path for path in paths if path.exists() and not {" ", ":"} & set(str(path))), None)


def _cpu_quota(cgroup: Path) -> float | None:
    """Cores that the control group grants (version 2's file, then version 1's); ``None`` without a limit."""
    words = _read(cgroup / "cpu.max").split()
    if not words:
        words = [_read(cgroup / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    quota, period = (_number(word) for word in words) if len(words) == 2 else (None, None)
    return quota / period if quota and period and quota > 0 else None


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
