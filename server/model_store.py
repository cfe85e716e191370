"""From what the user calls a model to a folder that the engine can load.

A known model is fetched and converted once into ``<cache>/models/<name>``. The folder appears there complete or not at
all; work that was interrupted goes on at the next start; a lock keeps two processes from doing it at the same time.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from server.errors import ModelError, SlipstreamError
from server.model_convert import convert, versions
from server.model_fetch import KNOWN_MODELS, KnownModel, fetch_gguf
from server.model_manifest import problems, sync, write_manifest
from server.progress import Progress, ProgressBar, part, silent

_SOURCE_FILE = "source.gguf"
_WEIGHTS = "model.safetensors"


def resolve_model(
    source: str, cache_dir: Path, progress: Progress = silent, known: Mapping[str, KnownModel] = KNOWN_MODELS
) -> Path:
    """The folder of a model, fetched and converted first where that is needed.

    Args:
        source: name of a known model, or path of a folder with ``config.json`` and safetensors.
        cache_dir: where known models are kept.
        progress: told how far fetching and converting is; not called when there is nothing to do.
        known: the models that can be fetched.

    Raises:
        ModelError: there is no such model, or it cannot be used or made.
    """
    if source not in known:
        return _check_folder(source, known)
    model = known[source]
    folder = model_folder(source, cache_dir)
    if not problems(folder, model.sha256, thorough=False):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock"), progress) as lock:
            # Another process may have made it while this one waited for the lock.
            if problems(folder, model.sha256, thorough=False):
                _make(model, folder, progress, lock)
    except OSError as error:
        raise ModelError(f"{model.name} cannot be kept in {folder.parent}: {error}") from error
    return folder


def model_folder(name: str, cache_dir: Path) -> Path:
    """Where a known model lies, or will lie."""
    return cache_dir / "models" / name


def model_problems(name: str, cache_dir: Path, *, thorough: bool) -> list[str]:
    """What is wrong with the cached copy of a known model; ``thorough`` reads every byte of it."""
    return problems(model_folder(name, cache_dir), KNOWN_MODELS[name].sha256, thorough=thorough)


def _make(model: KnownModel, folder: Path, progress: Progress, lock: int) -> None:
    """Fetch and convert ``model`` into ``folder``, replacing whatever is there."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    free = shutil.disk_usage(partial).free
    if free < model.disk_bytes:
        raise ModelError(
            f"{model.name} needs {model.disk_bytes / 1e9:.1f} GB of disk space in {folder.parent} while it is made; "
            f"{free / 1e9:.1f} GB are free"
        )
    gguf, converted = partial / _SOURCE_FILE, partial / "converted"
    fetch_gguf(model, gguf, part(progress, 0.0, 0.4))
    shutil.rmtree(converted, ignore_errors=True)
    convert(gguf, converted, part(progress, 0.4, 0.95), keep_open=(lock,))
    progress(0.95, "checking")
    write_manifest(converted, model.source, versions())
    if folder.exists():
        shutil.rmtree(folder)
    converted.rename(folder)
    sync(folder.parent)
    shutil.rmtree(partial, ignore_errors=True)
    progress(1.0, "ready")


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[int]:
    """Hold the lock file ``path``, waiting for whoever holds it; yields its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(0.0, "waiting for another process that is making it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _check_folder(source: str, known: Mapping[str, KnownModel]) -> Path:
    folder = Path(source).expanduser()
    if not folder.exists():
        raise ModelError(_not_found(source, folder, known))
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; a model is a folder with config.json and safetensors")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; a model is a folder with config.json and safetensors")
    if missing := _missing_weights(folder):
        raise ModelError(f"{folder} has no {missing}; a model is a folder with config.json and safetensors")
    return folder


def _missing_weights(folder: Path) -> str:
    """The first file of weights that should be in the folder and is not; empty when all are there."""
    index = folder / f"{_WEIGHTS}.index.json"
    if not index.is_file():
        return "" if any(folder.glob("*.safetensors")) else "*.safetensors"
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weights: {error}") from error
    return next((name for name in shards if not (folder / name).is_file()), "")


def _not_found(source: str, folder: Path, known: Mapping[str, KnownModel]) -> str:
    close = get_close_matches(source.lower(), known, n=1, cutoff=0.4)
    if close or folder.name == source:
        nearest = f"; nearest: {close[0]}" if close else ""
        return f"unknown model {source!r}, and no such folder; known models: {', '.join(known)}{nearest}"
    hub = f"; from the Hugging Face hub: hf download {source} --local-dir {source}" if _like_hub_name(source) else ""
    return f"model folder {folder} does not exist; known models: {', '.join(known)}{hub}"


def _like_hub_name(source: str) -> bool:
    return source.count("/") == 1 and source[0] not in "./~" and not source.endswith("/")


def main() -> int:
    """``python -m server.model_store``: make the target ready that ``slipstream serve`` without flags would serve."""
    from server.config import DEFAULT_PRESET, load_settings

    try:
        model = load_settings(DEFAULT_PRESET, os.environ, {}).model
        with ProgressBar(f"model {model.source}") as bar:
            resolve_model(model.source, model.cache_dir, bar)
    except SlipstreamError as error:
        print(f"slipstream: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
