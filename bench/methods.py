"""The ways of decoding that can be compared, each as the engine process that a report starts for it.

A method is a name and a function from the settings that all engines of a report share to a command line, so adding
one (a fixed draft length, vLLM's n-gram proposer) is adding an entry to ``METHODS``. A server that is not ours needs
none: ``bench.servers`` makes a method of it.
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.errors import BenchError

__all__ = ["METHODS", "EngineSettings", "Launch", "Method", "cpu_environment", "find_methods", "settings_text"]

LOOPBACK = "127.0.0.1"

_LIBRARY_FOLDERS = (
    Path(sys.prefix) / "lib",
    Path("/usr/lib/x86_64-linux-gnu"),
    Path("/usr/lib/aarch64-linux-gnu"),
    Path("/usr/lib64"),
    Path("/usr/lib"),
    Path("/usr/local/lib"),
)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What every engine of one report is started with.

    Attributes:
        model: folder of the target, absolute.
        dtype: format of the weights and of the arithmetic, ``float32`` for example.
        max_model_len: longest prompt and answer together, tokens.
        max_num_seqs: requests that run at the same time.
        max_num_batched_tokens: tokens of one step; longer prompts are read in chunks of this size.
        block_size: tokens of one KV page.
        kv_cache_gib: memory for K/V pages, GiB.
        vllm_args: further arguments for unmodified vLLM.
        engine_args: further arguments for our servers.
    """

    model: Path
    dtype: str = "float32"
    max_model_len: int = 2048
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    block_size: int = 32
    kv_cache_gib: float = 1.0
    vllm_args: tuple[str, ...] = ()
    engine_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one engine, or where to find one.

    Attributes:
        command: its command line.
        environment: variables added to the environment that it inherits.
        address: base URL of a server that runs already, so that nothing is started and ``command`` is empty.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    address: str | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """One way of decoding.

    Attributes:
        name: what the command line and the report call it.
        summary: one line for people.
        launch: the engine's command for the shared settings and a TCP port on loopback.
        plain: it decodes one token per step by definition, so nobody has to ask it for counters.
        settings: of a variant, what makes it differ from ``slipstream``, by ``section.name``.
        external: of a server that is not ours, its address or the command line that starts it, for people to read.
            The shared settings do not reach it: the format of its weights, for one, is not theirs.
    """

    name: str
    summary: str
    launch: Callable[[EngineSettings, int], Launch]
    plain: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    external: str | None = None

    @property
    def title(self) -> str:
        """Its name and, of a variant or a server that is not ours, what it is."""
        details = settings_text(self.settings) or self.external
        return f"{self.name} ({details})" if details else self.name


def cpu_environment(
    inherited: Mapping[str, str] | None = None, folders: Sequence[Path] = _LIBRARY_FOLDERS
) -> dict[str, str]:
    """The environment in which unmodified vLLM is at its best on a small CPU machine.

    - vLLM's CPU worker asks for Intel's OpenMP and for tcmalloc in ``LD_PRELOAD`` (its installation guide tells users
      to set both by hand): they are added where they are present, unless a library of the same kind is there already.
    - By default it keeps one core free for its scheduler process, which on two cores halves the arithmetic:
      ``VLLM_CPU_NUM_OF_RESERVED_CPU=0`` gives the workers all cores.
    - Usage statistics are off: a benchmark talks to nobody but its own children.

    Args:
        inherited: the environment to add to; this process's own by default.
        folders: where to look for the libraries, in this order.
    """
    inherited = os.environ if inherited is None else inherited
    preload = [entry for entry in inherited.get("LD_PRELOAD", "").replace(" ", ":").split(":") if entry]
    # vLLM asserts that not two OpenMP runtimes are preloaded.
    wanted = ((("tcmalloc",), "libtcmalloc*.so*"), (("libiomp", "libomp", "libgomp"), "libiomp5.so"))
    for kinds, pattern in wanted:
        if any(kind in Path(entry).name for kind in kinds for entry in preload):
            continue
        library = _find_library(pattern, folders)
        if library:
            preload.append(str(library))
    environment = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_NO_USAGE_STATS": "1"}
    if preload:
        environment["LD_PRELOAD"] = ":".join(preload)
    return environment


def settings_text(settings: Mapping[str, str]) -> str:
    """Settings as people type them: ``section.name=value, section.name=value``."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def find_methods(names: str, known: Mapping[str, Method]) -> tuple[Method, ...]:
    """The methods of a comma-separated list, in its order.

    Raises:
        BenchError: the list is empty or names a method twice or one that is not known.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise BenchError(f"no methods given; known methods: {', '.join(known)}")
    for position, name in enumerate(wanted):
        if name not in known:
            raise BenchError(f'unknown method "{name}"; known methods: {", ".join(known)}')
        if name in wanted[:position]:
            raise BenchError(f'method "{name}" is given twice')
    return tuple(known[name] for name in wanted)


def _find_library(pattern: str, folders: Sequence[Path]) -> Path | None:
    """The first match; debug and profiling builds are slower than having none."""
    for folder in folders:
        for path in sorted(folder.glob(pattern)):
            if not any(word in path.name for word in ("debug", "profiler", "_db")):
                return path
    return None


def _launch_vllm(settings: EngineSettings, port: int) -> Launch:
    command = (
        # vLLM's `serve` command looks for a distribution called "vllm", which its CPU build is not; this is the server
        # that the command starts.
        *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(settings.model)),
        *("--dtype", settings.dtype),
        *("--max-model-len", str(settings.max_model_len)),
        *("--max-num-seqs", str(settings.max_num_seqs)),
        *("--max-num-batched-tokens", str(settings.max_num_batched_tokens)),
        *("--block-size", str(settings.block_size)),
        *("--kv-cache-memory-bytes", str(int(settings.kv_cache_gib * 2**30))),
        "--enforce-eager",
        *("--host", LOOPBACK, "--port", str(port)),
        "--no-enable-log-requests",
        "--disable-uvicorn-access-log",
        *settings.vllm_args,
    )
    return Launch(command, cpu_environment() if _installed("vllm-cpu") else {"VLLM_NO_USAGE_STATS": "1"})


def _launch_ours(settings: EngineSettings, port: int, *, speculation: bool) -> Launch:
    """Our launcher sets its own environment, so none is added here."""
    command = (
        *(sys.executable, "-m", "server.cli", "serve"),
        *("--model.source", str(settings.model)),
        *("--model.dtype", settings.dtype),
        *("--model.max_model_len", str(settings.max_model_len)),
        *("--engine.max_num_seqs", str(settings.max_num_seqs)),
        *("--engine.max_num_batched_tokens", str(settings.max_num_batched_tokens)),
        *("--engine.kv_cache_gib", str(settings.kv_cache_gib)),
        *("--engine.block_size", str(settings.block_size)),
        *("--server.host", LOOPBACK, "--server.port", str(port)),
        "--speculation.enabled" if speculation else "--no-speculation.enabled",
        *settings.engine_args,
    )
    return Launch(command)


def _launch_ar(settings: EngineSettings, port: int) -> Launch:
    return _launch_ours(settings, port, speculation=False)


def _launch_slipstream(settings: EngineSettings, port: int) -> Launch:
    return _launch_ours(settings, port, speculation=True)


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("vllm", "unmodified vLLM", _launch_vllm, plain=True),
        Method("ar", "our engine with drafting off", _launch_ar, plain=True),
        Method("slipstream", "our engine with the drafter on", _launch_slipstream),
    )
}
