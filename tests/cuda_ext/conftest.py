"""The implementations that the tests hold against the oracle."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from cuda_ext import ops, reference
from tests.cuda_ext.oracle import instruction_set
from tests.one_thread import one_thread

__all__ = ["one_thread"]

_COMPILED = ops.kernels().cpu_compiled
_SETS = torch.ops.slipstream.supported_cpu_isas().split(",") if _COMPILED else []


@pytest.fixture(params=["reference", *(_SETS or ["operator"])])
def operations(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """``cuda_ext.reference`` and ``cuda_ext.ops``, the latter with every instruction set that this processor has."""
    if request.param == "reference":
        yield reference
    elif request.param == "operator":
        yield ops
    else:
        with instruction_set(request.param):
            yield ops


@pytest.fixture(params=_SETS or ["compiled"])
def compiled(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """``cuda_ext.ops`` where its kernels are compiled, with every instruction set."""
    if not _SETS:
        pytest.skip("compiled kernels are not built: what is tested here is theirs alone")
    with instruction_set(request.param):
        yield ops


@pytest.fixture(scope="session")
def instruction_sets() -> list[str]:
    """What ``oracle.instruction_set`` may be asked for; empty where no kernels are compiled."""
    return _SETS
