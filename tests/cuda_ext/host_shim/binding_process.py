"""Calls the CUDA kernel of ``block_attention`` in a process of its own: ``binding_process LIBRARY CALLS RESULTS``.

A library cannot be unloaded, and this one replaces the kernel of the CUDA key.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[3]


def call_all(library: Path, calls: Sequence[tuple[Any, ...]]) -> list[torch.Tensor | str]:
    """What the kernel in ``library`` returns for each tuple of arguments, or the text of its error."""
    inputs, results = library.with_suffix(".calls"), library.with_suffix(".results")
    torch.save(list(calls), inputs)
    module = "tests.cuda_ext.host_shim.binding_process"
    command = [sys.executable, "-m", module, str(library), str(inputs), str(results)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outputs: list[torch.Tensor | str] = torch.load(results)
    return outputs


def main(library: str, inputs: str, results: str) -> None:
    """Load, call, and save."""
    from cuda_ext import ops

    torch.ops.load_library(library)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    outcomes: list[torch.Tensor | str] = []
    for arguments in torch.load(inputs):
        try:
            outcomes.append(ops.block_attention.redispatch(keys, *arguments))
        except RuntimeError as error:
            outcomes.append(str(error))
    torch.save(outcomes, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
