"""Compiling the kernels: ``python -m cuda_ext.build cpu`` (or ``cuda``).

The compiler runs here and nowhere else: not while the package is installed, not while the server starts.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cuda_ext.library import BUILT, library_path

DEVICES = ("cpu", "cuda")
_PROJECT = Path(__file__).parent


class BuildError(Exception):
    """The kernels could not be compiled; the message says why and where the compiler's words are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Build what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cuda_ext.build", description="Compile Slipstream's kernels.")
    parser.add_argument("devices", nargs="*", default=["cpu"], metavar="DEVICE", help="cpu (default), cuda, or both")
    parser.add_argument("--if-possible", action="store_true", help="without a compiler say so and succeed")
    args = parser.parse_args(argv)
    if unknown := [device for device in args.devices if device not in DEVICES]:
        parser.error(f"unknown device {unknown[0]!r}, expected {' or '.join(DEVICES)}")
    for device in args.devices:
        if args.if_possible and (missing := missing_tools(device)):
            print(f"kernels: {missing} not found; the slower PyTorch operators are used instead", file=sys.stderr)
            continue
        try:
            build(device)
        except BuildError as error:
            print(f"kernels: error: {error}", file=sys.stderr)
            return 1
    return 0


def missing_tools(device: str) -> str:
    """Tools that building for ``device`` lacks here, in words; empty when there are all."""
    compilers = [] if os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") else ["a C++ compiler"]
    if device == "cuda" and not shutil.which("nvcc"):
        compilers.append("nvcc")
    tools = [name for name in ("cmake", "ninja") if _tool(name) is None]
    return " and ".join(compilers + tools)


def build(device: str) -> Path:
    """Compile the library of ``device`` unless it is there already; returns its path.

    Raises:
        BuildError: a tool is missing or the compiler failed.
    """
    target = library_path(device)
    if target.exists():
        return target
    if missing := missing_tools(device):
        raise BuildError(f"{missing} not found")
    BUILT.mkdir(exist_ok=True)
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(device, target)
    return target


def _compile(device: str, target: Path) -> None:
    started = time.monotonic()
    print(f"kernels: compiling for {device}, about half a minute", file=sys.stderr, flush=True)
    log = BUILT / f"{device}.log"
    with tempfile.TemporaryDirectory(prefix="slipstream-build-") as folder, log.open("w") as output:
        configure = [
            *(_found("cmake"), "-S", str(_PROJECT), "-B", folder, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={_found('ninja')}",
            f"-DSLIPSTREAM_TORCH={Path(torch.__file__).parent}",
            f"-DSLIPSTREAM_DEVICE={device}",
            f"-DSLIPSTREAM_OUTPUT={target.stem}",
        ]
        for command in (configure, [_found("cmake"), "--build", folder]):
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
                raise BuildError(f"the {device} kernels do not compile, see {log}")
        unfinished = target.with_suffix(".partial")
        shutil.copy(Path(folder) / target.name, unfinished)
    for older in BUILT.glob(f"slipstream_{device}-*.so"):
        older.unlink()
    os.replace(unfinished, target)
    print(f"kernels: compiled for {device} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _tool(name: str) -> str | None:
    """A tool of this environment, or else of the machine."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _found(name: str) -> str:
    tool = _tool(name)
    assert tool is not None
    return tool


if __name__ == "__main__":
    sys.exit(main())
