"""What a user can get wrong with ``slipstream serve``: one line, exit code 2, nothing left running."""

import json
import shutil
import socket
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from bench.process import free_port
from drafter.config import DrafterConfig
from server.config import load_settings
from server.model_store import resolve_model
from tests.server.conftest import RunCommand


@pytest.fixture
def serve(slipstream: RunCommand) -> RunCommand:
    """``slipstream serve`` on a port of its own."""

    def run(*arguments: str) -> CompletedProcess[str]:
        return slipstream("serve", "--server.port", str(free_port()), *arguments)

    return run


def _settings_model() -> Path:
    settings = load_settings("smollm2-cpu", {}, {})
    return resolve_model(settings.model.source, settings.model.cache_dir)


def _other_drafter(folder: Path) -> Path:
    config = DrafterConfig(64, 128, 1, 4, 2, 16, 300, 1e-5, 1e4, False, (1, 40), 4, 3)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def _assert_one_line(result: CompletedProcess[str], *expected: str) -> None:
    error = result.stderr
    assert result.returncode == 2, error
    lines = [line for line in error.splitlines() if "error" in line]
    assert len(lines) == 1 and "Traceback" not in error, error
    for text in expected:
        assert text in lines[0]


def test_missing_model_folder(serve: RunCommand, tmp_path: Path) -> None:
    result = serve("--model.source", str(tmp_path / "nowhere"), "--server.port", "0x")
    _assert_one_line(result, "server.port")
    result = serve("--model.source", str(tmp_path / "nowhere"))
    _assert_one_line(result, str(tmp_path / "nowhere"))


def test_drafter_made_for_another_target(serve: RunCommand, tmp_path: Path) -> None:
    drafter = _other_drafter(tmp_path / "other-drafter")
    result = serve("--speculation.drafter", str(drafter))
    _assert_one_line(result, str(drafter), str(_settings_model()), "64 against 576", "300 against 49152", "[40] of 30")


def test_taken_port(serve: RunCommand) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = serve("--server.port", str(port))
    _assert_one_line(result, f"port {port}", "--server.port")


@pytest.mark.parametrize(
    ("gib", "expected"), [("60000", "more memory than is free"), ("0.01", "cannot hold one request")]
)
def test_no_memory_for_the_kv_cache(gib: str, expected: str, serve: RunCommand) -> None:
    result = serve("--engine.kv_cache_gib", gib)
    _assert_one_line(result, "engine.kv_cache_gib", expected)


def test_context_longer_than_the_target_was_made_for(serve: RunCommand) -> None:
    _assert_one_line(serve("--model.max_model_len", "9000"), "9000", "8192")


def test_what_only_the_engine_finds_out_is_one_line_too(serve: RunCommand, tmp_path: Path) -> None:
    broken = tmp_path / "broken-model"
    shutil.copytree(_settings_model(), broken, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    (broken / "model.safetensors").write_bytes(b"not a model")
    result = serve("--model.source", str(broken))
    _assert_one_line(result, "the engine did not start")
