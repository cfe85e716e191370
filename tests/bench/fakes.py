"""Methods whose engines are fake servers, and what the tests need to run a benchmark with them.

Run as a program it is ``slipstream bench`` with these methods, for the tests that interrupt it:
``fakes.py FOLDER ARGUMENTS…``.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.cli import add_arguments, run
from bench.methods import EngineSettings, Launch, Method
from tests.bench.fake_server import FakeBehaviour

# JSON may contain the line separator of Unicode as it is; a stream must not be split there.
PROMPTS = {"math": ("one", "two"), "chat": ("three", "four", "fi\u2028ve")}


def fake_method(folder: Path, name: str, *, plain: bool = True, **behaviour: Any) -> Method:
    """A method that is a fake server with this behaviour."""
    behaves = FakeBehaviour(str(folder), name, **behaviour)

    def launch(settings: EngineSettings, port: int) -> Launch:
        return Launch(behaves.command(port))

    return Method(name, f"fake {name}", launch, plain=plain)


def script_method(name: str, script: str) -> Method:
    """A method whose engine is a shell script, which never answers."""
    return Method(name, f"script {name}", lambda _settings, _port: Launch(("/bin/sh", "-c", script)))


def fake_methods(folder: Path) -> Mapping[str, Method]:
    """The usual ones: two baselines, a fast one with counters and one different answer, and two that do not start."""
    methods = (
        fake_method(folder, "vllm", step_seconds=0.006),
        fake_method(folder, "ar", step_seconds=0.004),
        fake_method(folder, "slipstream", plain=False, tokens_per_step=3, counters=True, differs_on="two"),
        script_method("broken", "echo first line; echo no such model >&2; exit 7"),
        script_method("silent", f'echo "$$ $$" > {folder}/silent.pid; exec sleep 600'),
    )
    return {method.name: method for method in methods}


def write_prompts(folder: Path) -> Path:
    """A prompt file of ``PROMPTS``."""
    lines = [
        json.dumps({"category": category, "prompt": prompt})
        for category, prompts in PROMPTS.items()
        for prompt in prompts
    ]
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_model(folder: Path) -> Path:
    """Something that looks like a model's folder from outside."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    return model


def parse(arguments: list[str]) -> argparse.Namespace:
    """The arguments of the command, as its parser gives them; by default no more at once than there are prompts."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--concurrency", "1,2", *arguments])


def engine_pids(folder: Path) -> list[int]:
    """All processes that engines of this folder ever were."""
    return [int(pid) for file in folder.glob("*.pid") for pid in file.read_text().split()]


def is_running(pid: int) -> bool:
    """The process exists and does not merely wait to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Wait for something to become true, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(run(parse(sys.argv[2:]), fake_methods(Path(sys.argv[1]))))
