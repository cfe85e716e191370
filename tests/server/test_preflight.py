"""Checks before the engine starts."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from bench.process import free_port
from cuda_ext import ops
from drafter.config import DrafterConfig
from server.errors import ConfigError, DrafterError, ModelError, ServerStartError
from server.preflight import (
    bind,
    check_drafter,
    check_length,
    check_memory,
    check_trace_file,
    check_weight_format,
    kv_bytes_per_token,
    read_target_config,
)
from server.settings import EngineSettings, ModelSettings, Settings

TARGET: dict[str, Any] = {
    "hidden_size": 64,
    "vocab_size": 300,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    folder = tmp_path / "drafter"
    folder.mkdir()
    config = DrafterConfig(64, 128, 2, 4, 2, 16, 300, 1e-5, 1e4, False, (0, 3), 4, 3)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    return folder


def _settings(max_model_len: int = 1024, gib: float = 0.01) -> Settings:
    return Settings(model=ModelSettings(max_model_len=max_model_len), engine=EngineSettings(kv_cache_gib=gib))


def test_bind_listens_and_names_a_taken_port() -> None:
    port = free_port()
    expected = pytest.raises(ServerStartError, match=f"127.0.0.1 port {port}: Address already in use")
    with bind("127.0.0.1", port), socket.create_connection(("127.0.0.1", port), timeout=5), expected:
        bind("127.0.0.1", port)


def test_bind_names_an_address_that_is_not_ours() -> None:
    with pytest.raises(ServerStartError, match="192.0.2.1 port"):
        bind("192.0.2.1", free_port())


def test_target_config_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config.json cannot be read"):
        read_target_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json cannot be read"):
        read_target_config(tmp_path)


def test_length_limit_is_the_targets() -> None:
    check_length(_settings(max_model_len=2048), TARGET)
    with pytest.raises(ModelError, match="model.max_model_len = 2049 .* 2048 tokens"):
        check_length(_settings(max_model_len=2049), TARGET)


def test_drafter_that_fits_and_one_that_does_not(drafter: Path) -> None:
    check_drafter(drafter, Path("target"), TARGET)
    with pytest.raises(DrafterError, match="hidden size 64 against 96; it reads target layers \\[3\\] of 3"):
        check_drafter(drafter, Path("target"), {**TARGET, "hidden_size": 96, "num_hidden_layers": 3})


def test_bytes_of_a_token_count_target_and_drafter(drafter: Path) -> None:
    assert kv_bytes_per_token("float32", TARGET, None) == 2 * 4 * 2 * 16 * 4
    assert kv_bytes_per_token("bfloat16", TARGET, None) == 2 * 4 * 2 * 16 * 2
    assert kv_bytes_per_token("bfloat16", TARGET, drafter) == 2 * 4 * 2 * 16 * 2 + 2 * 2 * 2 * 16 * 4


def test_memory_must_hold_the_longest_request(drafter: Path) -> None:
    needed = 1024 * kv_bytes_per_token("float32", TARGET, drafter) / 2**30
    check_memory(_settings(gib=needed * 1.001), TARGET, drafter)
    with pytest.raises(ServerStartError, match="cannot hold one request of model.max_model_len = 1024 tokens"):
        check_memory(_settings(gib=needed * 0.999), TARGET, drafter)
    with pytest.raises(ServerStartError, match="more memory than is free"):
        check_memory(_settings(gib=60_000), TARGET, None)


def test_a_rounded_model_is_never_another_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = ops.Kernels("instruction set avx2", "", True, False)
    monkeypatch.setattr(ops, "kernels", lambda: compiled)
    check_weight_format(Settings(model=ModelSettings(dtype="bfloat16")))
    check_weight_format(Settings(model=ModelSettings(weight_format="vllm", dtype="bfloat16")))
    check_weight_format(Settings(model=ModelSettings(weight_format="int8")))
    with pytest.raises(ConfigError, match="int8 rounds float32 weights, and model.dtype is bfloat16"):
        check_weight_format(Settings(model=ModelSettings(weight_format="int8", dtype="bfloat16")))
    missing = ops.Kernels("the library was not built", "", False, False)
    monkeypatch.setattr(ops, "kernels", lambda: missing)
    with pytest.raises(ConfigError, match="bfloat16 needs the compiled CPU kernels: the library was not built"):
        check_weight_format(Settings(model=ModelSettings(weight_format="bfloat16")))


def test_a_trace_needs_a_new_file_in_a_folder_that_is_there(tmp_path: Path) -> None:
    check_trace_file(None)
    check_trace_file(tmp_path / "new.jsonl")
    (tmp_path / "old.jsonl").touch()
    with pytest.raises(ConfigError, match=r"speculation\.trace_file: .*old\.jsonl exists already"):
        check_trace_file(tmp_path / "old.jsonl")
    with pytest.raises(ConfigError, match=r"there is no folder .*missing"):
        check_trace_file(tmp_path / "missing" / "new.jsonl")
