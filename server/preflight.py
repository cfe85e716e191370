"""Checks before the engine starts, so that a mistake costs a second and one line."""

import json
import socket
from pathlib import Path
from typing import Any

from drafter.checkpoint import check_fits
from drafter.config import read_config
from drafter.errors import DrafterCheckpointError
from drafter.types import TargetShape
from scheduler.options import TargetWeights
from server.errors import ConfigError, DrafterError, ModelError, ServerStartError
from server.hardware import memory_gib
from server.settings import Settings

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything slow happens.

    Raises:
        ServerStartError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ServerStartError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --server.port"
        ) from error
    return listener


def read_target_config(folder: Path) -> dict[str, Any]:
    """The target's ``config.json``.

    Raises:
        ModelError: it is missing or not JSON.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return config


def check_trace_file(path: Path | None) -> None:
    """Raise ``ConfigError`` when drafts cannot be recorded there."""
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"speculation.trace_file: {path} exists already; a trace is written to a new file")
    if not path.parent.is_dir():
        raise ConfigError(f"speculation.trace_file: there is no folder {path.parent}")


def check_length(settings: Settings, target: dict[str, Any]) -> None:
    """Raise ``ModelError`` when the target was not made for the context length asked for."""
    longest = target.get("max_position_embeddings")
    if longest is not None and settings.model.max_model_len > longest:
        raise ModelError(
            f"model.max_model_len = {settings.model.max_model_len} is more than {settings.model.source} "
            f"was made for: {longest} tokens"
        )


def check_weight_format(settings: Settings) -> None:
    """Refuse to serve a model as it is under the name of a rounded one.

    Raises:
        ConfigError: weights should be rounded, and what rounds them would not run.
    """
    model = settings.model
    if not TargetWeights(model.weight_format).changes_model:
        return
    from cuda_ext import ops

    asked = f"model.weight_format = {model.weight_format}"
    if model.dtype != "float32":
        raise ConfigError(f"{asked} rounds float32 weights, and model.dtype is {model.dtype}")
    if not ops.kernels().cpu_compiled:
        raise ConfigError(f"{asked} needs the compiled CPU kernels: {ops.kernels().cpu}")


def check_drafter(drafter: Path, target_folder: Path, target: dict[str, Any]) -> None:
    """Raise ``DrafterError`` when the drafter cannot be read or was made for another target."""
    shape = TargetShape(
        hidden_size=target.get("hidden_size", 0),
        vocab_size=target.get("vocab_size", 0),
        num_layers=target.get("num_hidden_layers", 0),
        path=str(target_folder),
    )
    try:
        check_fits(read_config(drafter), shape, str(drafter))
    except DrafterCheckpointError as error:
        raise DrafterError(str(error)) from error


def check_memory(settings: Settings, target: dict[str, Any], drafter: Path | None) -> None:
    """Raise ``ServerStartError`` when the K/V cache does not fit the memory, or not one longest request."""
    wanted = int(settings.engine.kv_cache_gib * 2**30)
    memory = memory_gib()
    if memory is not None and settings.engine.kv_cache_gib > memory[1]:
        raise ServerStartError(
            f"engine.kv_cache_gib = {settings.engine.kv_cache_gib:g} asks for more memory than is free: "
            f"{memory[1]:.1f} GiB"
        )
    needed = kv_bytes_per_token(settings.model.dtype, target, drafter) * settings.model.max_model_len
    if needed > wanted:
        raise ServerStartError(
            f"engine.kv_cache_gib = {settings.engine.kv_cache_gib:g} cannot hold one request of model.max_model_len = "
            f"{settings.model.max_model_len} tokens, which needs {needed / 2**30:.2f} GiB: raise one or lower the other"
        )


def kv_bytes_per_token(dtype: str, target: dict[str, Any], drafter: Path | None) -> int:
    """Bytes of paged cache for one token of context, target and drafter together; an estimate for ``auto``."""
    heads = target.get("num_attention_heads", 1)
    head_dim = target.get("head_dim") or target.get("hidden_size", 0) // heads
    layers, kv_heads = target.get("num_hidden_layers", 0), target.get("num_key_value_heads") or heads
    total = 2 * layers * kv_heads * head_dim * _DTYPE_BYTES.get(dtype, 2)
    if drafter is not None:
        total += read_config(drafter).cache_bytes_per_token
    return int(total)
