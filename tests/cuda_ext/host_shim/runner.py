"""Compiling the CUDA sources for the host and running cases of block attention on what comes out."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cuda_ext.library import SOURCES
from tests.cuda_ext.oracle import Case

SHIM = Path(__file__).parent
CUDA_SOURCES = SOURCES / "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-pthread")


@dataclass(frozen=True)
class Device:
    """What the host imitates.

    Attributes:
        multiprocessors: few make a thread block go from chunk to chunk.
        copies_late: asynchronous copies happen when they are waited for, and not when they start.
        poison: byte that shared memory is filled with at first.
    """

    multiprocessors: int = 1
    copies_late: bool = True
    poison: int = 0xFF


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its outputs, as far as they go, and the exit code and words of the program."""

    outputs: list[torch.Tensor]
    returncode: int
    words: str


def compile_command(target: Path, *flags: str, sources: Path = CUDA_SOURCES) -> list[str]:
    """The compiler's command for the runner, with the CUDA sources of a folder."""
    paths = ("-I", str(SHIM), "-I", str(sources))
    files = ("-x", "c++", str(sources / "block_attention.cu"), str(SHIM / "runner.cpp"))
    return ["g++", *_FLAGS, *flags, *paths, *files, "-o", str(target)]


def run_cases(program: Path, cases: Sequence[Case], device: Device = Device(), timeout: float = 400) -> Outcome:
    """Run cases; a hang counts as an error of the program (code -1)."""
    inputs, outputs = program.with_suffix(f".{os.getpid()}.in"), program.with_suffix(f".{os.getpid()}.out")
    inputs.write_bytes(b"".join([_number(len(cases)), *(_serialised(case, device) for case in cases)]))
    outputs.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [program, inputs, outputs], capture_output=True, text=True, timeout=timeout, check=False, errors="replace"
        )
        code, words = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        code, words = -1, f"not finished after {timeout} s"
    data = outputs.read_bytes() if outputs.exists() else b""
    return Outcome(_parsed(data, cases), code, words)


def outputs_of(program: Path, cases: Sequence[Case], device: Device = Device()) -> list[torch.Tensor]:
    """Outputs of cases that must run without a word."""
    outcome = run_cases(program, cases, device)
    assert outcome.returncode == 0 and not outcome.words, outcome.words
    assert len(outcome.outputs) == len(cases)
    return outcome.outputs


def _number(*numbers: Any) -> bytes:
    return np.array(numbers, dtype=np.int64).tobytes()


def _serialised(case: Case, device: Device) -> bytes:
    requests, queries, heads, head_dim = case.query.shape
    rows = (case.query, case.block_key, case.block_value, case.key_cache, case.value_cache)
    indices = (case.block_tables, case.context_lens, case.visible)
    storages: dict[int, torch.UntypedStorage] = {}
    places = {}
    for tensor in (*rows, *indices):
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)
        places[id(tensor)] = list(storages).index(storage.data_ptr())
    sizes = (requests, queries, case.block_key.shape[1], heads, case.block_key.shape[2], head_dim)
    header = _number(
        *(DTYPES.index(case.query.dtype), *sizes, case.block_tables.shape[1], case.key_cache.shape[1]),
        *(device.multiprocessors, device.copies_late, device.poison, len(storages)),
    )
    parts = [header, np.array([case.scale]).tobytes()]
    for storage in storages.values():
        parts += [_number(storage.nbytes()), torch.tensor([], dtype=torch.uint8).set_(storage).numpy().tobytes()]
    for tensor in rows:
        parts.append(_number(places[id(tensor)], tensor.storage_offset(), *tensor.stride()[:3]))
    for tensor in indices:
        parts.append(_number(places[id(tensor)], tensor.storage_offset(), tensor.stride(0)))
    return b"".join(parts)


def _parsed(data: bytes, cases: Sequence[Case]) -> list[torch.Tensor]:
    outputs = []
    for case in cases:
        size = case.query.numel() * case.query.element_size()
        if len(data) < 8 + size:
            break
        code = int.from_bytes(data[:8], "little")
        assert code == 0, f"launch_block_attention returned error {code}"
        output = torch.empty(case.query.shape, dtype=case.query.dtype)
        if size:
            output.copy_(torch.frombuffer(bytearray(data[8 : 8 + size]), dtype=output.dtype).view(output.shape))
        outputs.append(output)
        data = data[8 + size :]
    return outputs
