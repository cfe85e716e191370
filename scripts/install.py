"""Set-up behind the Makefile: a virtual environment in ``.venv`` with Slipstream installed for development.

Run it as often as you like: when nothing changed it is done at once, and after an interruption it goes on. It needs
nothing but Python's standard library.

Usage: python scripts/install.py --cpu-index URL
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENT = ".[cpu,dev]"
OLDEST_PYTHON = (3, 11)

# Older ones, as Python 3.11 brings along, take twice as long to choose and to unpack.
PIP = "pip>=25"

# They come in with vLLM. Where they were built for another torch they fail to import, and transformers with them.
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")

_STAMP = "slipstream-installed"
_UNFINISHED = "slipstream-installing"


class InstallError(Exception):
    """Set-up cannot go on; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Install if needed; returns the exit code."""
    parser = argparse.ArgumentParser(description="Set up the development environment in .venv.")
    parser.add_argument("--cpu-index", required=True, help="package index with CPU builds of torch, the second resort")
    args = parser.parse_args(argv)
    try:
        install(ROOT, args.cpu_index)
    except InstallError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next run goes on", file=sys.stderr)
        return 130
    return 0


def install(root: Path, cpu_index: str) -> None:
    """Bring ``root/.venv`` up to date with ``root/pyproject.toml``.

    Args:
        root: the project's folder.
        cpu_index: where pip finds a CPU build of torch if its own configuration does not lead it to one.

    Raises:
        InstallError: Python is too old, or pip failed.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise InstallError(f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed, this is {sys.version}")
    venv = root / ".venv"
    stamp, wanted = venv / _STAMP, fingerprint(root)
    if is_current(stamp, wanted):
        return
    venv.mkdir(exist_ok=True)
    with (root / "pyproject.toml").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_current(stamp, wanted):
            return
        python = _ready_interpreter(venv)
        unfinished = venv / _UNFINISHED
        if unfinished.exists():
            _forget_half_installed(venv)
        unfinished.touch()
        _install_project(root, python, cpu_index, lock.fileno())
        _compile(python)
        _remove_unimportable(python, MEDIA_PACKAGES)
        unfinished.unlink()
        stamp.write_text(wanted, encoding="utf-8")


def fingerprint(root: Path) -> str:
    """Changes whenever the environment has to be installed anew: other requirements, other steps, another place."""
    parts = [(root / "pyproject.toml").read_bytes(), Path(__file__).read_bytes(), str(root).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def cpu_torch(root: Path) -> str:
    """The requirement for the CPU build of the torch that ``pyproject.toml`` pins."""
    import tomllib  # not at the top: an older Python should get as far as being told that it is too old

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pin = next(pin for pin in project["optional-dependencies"]["cpu"] if pin.startswith("torch=="))
    return f"{pin}+cpu"


def is_current(stamp: Path, wanted: str) -> bool:
    """Whether a finished installation of what is wanted is there."""
    python = stamp.parent / "bin" / "python"
    return python.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted


def half_installed(found: Iterable[Distribution]) -> list[Distribution]:
    """Packages whose installation was cut off: no record of their files, or files that are missing or short."""
    return [package for package in found if not _is_complete(package)]


def _is_complete(package: Distribution) -> bool:
    # pip writes the record last; files that it lists and that Python itself rewrites (bytecode) do not count.
    if not package.read_text("RECORD"):
        return False
    for file in package.files or ():
        if file.suffix == ".pyc":
            continue
        path = Path(str(file.locate()))
        if not path.exists() or (file.size is not None and path.stat().st_size != file.size):
            return False
    return True


def _ready_interpreter(venv: Path) -> Path:
    """The environment's Python, made first, or made anew when it is broken."""
    python = venv / "bin" / "python"
    pip_version: list[str | Path] = [python, "-m", "pip", "--version"]
    # The second attempt is for environments that were made without pip.
    if _succeeds(pip_version) or (_succeeds([python, "-m", "ensurepip"]) and _succeeds(pip_version)):
        return python
    print(f"setup: making {venv.name} with Python {sys.version.split()[0]}", file=sys.stderr)
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", venv], capture_output=True, text=True, check=False)
    if made.returncode or not _succeeds(pip_version):
        reason = (made.stdout + made.stderr).strip() or "pip does not run in it"
        raise InstallError(f"a virtual environment could not be made in {venv}: {reason}")
    return python


def _forget_half_installed(venv: Path) -> None:
    """Remove the metadata of half-installed packages, so that pip installs them over what is there."""
    for site in venv.glob("lib/python*/site-packages"):
        for package in half_installed(distributions(path=[str(site)])):
            metadata = getattr(package, "_path", None)
            if isinstance(metadata, Path) and metadata.is_dir():
                print(f"setup: {metadata.name} was left half installed; installing it again", file=sys.stderr)
                shutil.rmtree(metadata)


def _install_project(root: Path, python: Path, cpu_index: str, lock: int) -> None:
    """Install with pip as the user configured it; failing that, with PyTorch's index of CPU builds beside it."""
    log = root / ".venv" / "slipstream-install.log"
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile"]
    _run_pip([*command, PIP], root, log, lock)  # where that fails, the old one does it too
    # vLLM's CPU package asks for this very build of torch. Naming it first makes pip fail at once where it has none,
    # instead of after fetching a CUDA build of half a gigabyte.
    command += [cpu_torch(root), "-e", REQUIREMENT]
    if _run_pip(command, root, log, lock):
        return
    print(f"setup: pip alone did not manage ({log}); trying once more with {cpu_index}", file=sys.stderr)
    if _run_pip([*command, "--extra-index-url", cpu_index], root, log, lock):
        return
    tail = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "ERROR" in line][-3:]
    raise InstallError(f"pip failed, see {log}" + "".join(f"\n  {line}" for line in tail))


def _run_pip(command: Sequence[str], root: Path, log: Path, lock: int) -> bool:
    """Run pip with its output in ``log`` and what it is at on one line of the terminal.

    pip holds ``lock`` open too: should this process be killed, the next one waits until pip has ended.
    """
    started, columns = time.monotonic(), shutil.get_terminal_size().columns
    with log.open("w", encoding="utf-8", buffering=1) as output:
        pip = subprocess.Popen(
            command,
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(lock,),
        )
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                output.write(line)
                if line.startswith(("Collecting ", "Installing ", "Building ", "Preparing ", "Using ", "Successfully")):
                    _show(f"setup: {time.monotonic() - started:4.0f} s  {line.strip()}"[: columns - 1])
        except BaseException:
            pip.terminate()
            pip.wait()
            raise
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return pip.wait() == 0


def _show(text: str) -> None:
    """Replace the terminal's last line; without a terminal say only when pip begins to install."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif "Installing " in text or "Successfully" in text:
        print(text, file=sys.stderr, flush=True)


def _compile(python: Path) -> None:
    """Compile the bytecode of all packages, on every core, where pip uses one and takes as long as for the rest.

    Left to the first import it would slow down the first start, and show what the compiler warns of in them.
    """
    print("setup: compiling bytecode", file=sys.stderr, flush=True)
    # It fails for templates, which are no Python yet; nothing imports those.
    _succeeds([python, "-m", "compileall", "-q", "-j", "0", python.parent.parent / "lib"])


def _remove_unimportable(python: Path, packages: Sequence[str]) -> None:
    with ThreadPoolExecutor() as pool:
        importable = list(pool.map(lambda name: _succeeds([python, "-c", f"import {name}"]), packages))
    broken = [name for name, good in zip(packages, importable, strict=True) if not good and _is_installed(python, name)]
    if broken:
        print(f"setup: removing {', '.join(broken)}: they do not import beside this torch", file=sys.stderr)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)


def _is_installed(python: Path, name: str) -> bool:
    return _succeeds([python, "-c", f"import importlib.metadata as m; m.version('{name}')"])


def _succeeds(command: Sequence[str | Path]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
