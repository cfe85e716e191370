"""Programs and libraries made of the CUDA sources for the tests, each compiled once and two at a time."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.cuda_ext.host_shim.runner import CUDA_SOURCES, SHIM, compile_command

TORCH = Path(torch.__file__).parent
TORCH_FLAGS = ("-isystem", str(TORCH / "include"), f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu")
_THREADS = ("-fsanitize=thread",)
_MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def head_dims(*dims: int) -> str:
    """The compiler's flag for kernels of these head dimensions only."""
    return "-DSLIPSTREAM_HEAD_DIMS(X)=" + " ".join(f"X({dim})" for dim in dims)


@dataclass(frozen=True)
class Build:
    """One program.

    Attributes:
        flags: for the compiler.
        sanitizer: among them, flags that need libraries beside the compiler.
        replaced: text of ``block_attention.cuh`` and what stands there instead.
    """

    flags: tuple[str, ...] = ("-O1",)
    sanitizer: tuple[str, ...] = ()
    replaced: tuple[str, str] = ("", "")


def barriers() -> list[str]:
    """The lines of the kernels that hold a barrier."""
    lines = (CUDA_SOURCES / "block_attention.cuh").read_text().splitlines()
    return [line for line in lines if "__syncthreads();" in line]


def builds() -> dict[str, Build]:
    """All programs that the tests run, the slowest to compile first."""
    one = head_dims(64)
    mutants = {
        f"without barrier {index}": Build(("-O1", one), _THREADS, (line, line.replace("__syncthreads();", "")))
        for index, line in enumerate(barriers())
    }
    return {
        "plain": Build(),
        "memory": Build(("-O1", "-g", one), _MEMORY),
        "threads": Build(("-O1", "-g", one), _THREADS),
        **mutants,
        "without waiting": Build(("-O1", one), (), ("        wait_for_copies();\n", "")),
    }


class Programs:
    """What ``builds`` describes, compiled in the background from the start on."""

    def __init__(self, folder: Path, wanted: Mapping[str, Build]):
        self._folder = folder
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._wanted = wanted
        self._futures: dict[str, Future[Path]] = {}
        for name, build in wanted.items():
            self._futures[name] = self._pool.submit(self._compile, name, build)

    def program(self, name: str) -> Path:
        """Path of a program, waited for; the test is skipped where the compiler lacks what it needs."""
        if flags := self._wanted[name].sanitizer:
            require_sanitizer(self._folder, flags)
        return self._futures[name].result()

    def close(self) -> None:
        """Stop compiling what nobody has asked for."""
        self._pool.shutdown(cancel_futures=True)

    def _compile(self, name: str, build: Build) -> Path:
        target = self._folder / name.replace(" ", "-")
        sources = CUDA_SOURCES
        if build.replaced[0]:
            sources = shutil.copytree(CUDA_SOURCES, self._folder / f"{target.name}-sources")
            header = sources / "block_attention.cuh"
            text = header.read_text()
            assert text.count(build.replaced[0]) == 1, f"{name}: cannot find {build.replaced[0]!r} once"
            header.write_text(text.replace(*build.replaced))
        run_compiler(compile_command(target, *build.flags, *build.sanitizer, sources=sources))
        return target


def require_compiler() -> None:
    """Skip a test where there is no g++."""
    if not shutil.which("g++"):
        pytest.skip("no g++: the CUDA sources were not compiled for the host, and nothing about them was checked")


def require_sanitizer(folder: Path, flags: Sequence[str]) -> None:
    """Skip a test where programs with these sanitizers cannot be made or do not run."""
    source, program = folder / "empty.cpp", folder / f"empty{'-'.join(flags)}"
    if not program.exists():
        source.write_text("int main() { return 0; }\n")
        done = subprocess.run(["g++", *flags, source, "-o", program], capture_output=True, check=False)
        if done.returncode or subprocess.run([program], capture_output=True, check=False).returncode:
            program.unlink(missing_ok=True)
            pytest.skip(f"g++ cannot use {flags[0]} here: the CUDA sources were not checked for what it finds")


def run_compiler(command: Sequence[str | Path], timeout: float = 600) -> str:
    """Run a compiler that must succeed; returns what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def binding_command(target: Path) -> list[str]:
    """The compiler's command for a library of the binding and the kernels in which CPU tensors pass for CUDA ones.

    It imitates a device with too little shared memory for kernels in float32.
    """
    sources = [CUDA_SOURCES / "block_attention.cu", CUDA_SOURCES / "bindings.cpp", SHIM / "torch_device.cpp"]
    flags = ("-std=c++20", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-pthread", "-Wall", "-Wextra", "-Werror")
    paths = ("-I", str(SHIM), "-I", str(CUDA_SOURCES))
    device = "-DHOST_SHIM_SHARED_BYTES=49152"
    inputs = ("-x", "c++", *map(str, sources), "-x", "none")
    output = ("-Wl,-Bsymbolic", *TORCH_FLAGS, "-o", str(target))
    return ["g++", *flags, "-Wno-unknown-pragmas", head_dims(64), device, *paths, *inputs, *output]
