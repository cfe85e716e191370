"""The ``bench-kernels`` command on a machine that is known and takes no time to measure."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernel_cases, kernels, linear_cases, linear_products
from bench.layer_shape import LayerShape
from bench.linear_products import Product
from bench.linear_report import MissingLibrary, Peak
from bench.machine import describe_machine

PEAK = Peak(8.0, "a guess")

UNCOMPILED: dict[str, Any] = {
    "complete": True,
    "created": "2026-01-02T03:04:05+00:00",
    "command": ("slipstream", "bench-kernels"),
    "machine": replace(describe_machine(), cpu="a CPU", load_average=None),
    "operator": "not built; run: this",
    "operator_compiled": False,
    "threads": 2,
    "repeats": 1,
    "memory_gb_per_second": 12.34,
    "cache_bytes": None,
}
"""A ``CommonReport`` made without compiled kernels."""


SHAPE = LayerShape(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocabulary=50)
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
}
"""The same as a model's ``config.json``."""


def torch_libraries() -> list[Product]:
    """Those that come with PyTorch."""
    return [linear_products._Torch(), *([linear_products._OneDnn()] if torch.backends.mkldnn.is_available() else [])]


def measure_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with tiny caches, without vLLM, whose bounds need no measuring."""
    absent = [MissingLibrary("vLLM oneDNN", "not here")]
    monkeypatch.setattr(kernels, "last_level_cache_bytes", lambda: 4096)
    monkeypatch.setattr(kernel_cases, "read_bandwidth", lambda: 2e9)
    monkeypatch.setattr(linear_cases, "measure_peak", lambda: PEAK)
    monkeypatch.setattr(linear_products, "find_libraries", lambda: (torch_libraries(), absent))


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that failed on a mistake says: one line, and nothing else."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out
    assert captured.err.startswith("slipstream: error: ")
    return captured.err.removeprefix("slipstream: error: ")


def write_config(folder: Path, **changes: Any) -> Path:
    """A ``config.json`` of ``SHAPE``, but for some keys."""
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG | changes))
    return path
