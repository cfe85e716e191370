"""What is compiled for one instruction set must be reached through its own namespace only.

An inline function that two translation units share is linked once. Were the copy from the AVX-512 unit the one that is
kept, the kernels for lesser processors would stop there with an illegal instruction.
"""

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

from cuda_ext import ops
from cuda_ext.library import library_path

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_NAMESPACE = re.compile(r"^(?:[^\s(]+ )?slipstream::(avx2|avx512|scalar)::")
"""Of a demangled function; those made from templates have their result's type in front."""

_AVX = re.compile(r"%[yz]mm|^v\w+ .*%xmm|^vzero")
_AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|[23]\d)")


@pytest.fixture(scope="module")
def functions() -> dict[str, list[str]]:
    """Instructions by function of the compiled library."""
    objdump, path = shutil.which("objdump"), library_path("cpu")
    if objdump is None or not path.exists():
        pytest.skip("needs objdump and compiled kernels")
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", str(path)]
    found: dict[str, list[str]] = defaultdict(list)
    name = ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if start := _FUNCTION.match(line):
            name = start[1]
        elif line.startswith(" ") and "\t" in line:
            found[name].append(line.split("\t")[-1])
    if "x86-64" not in _header(objdump, str(path)):
        pytest.skip("one instruction set only")
    return found


def _header(objdump: str, path: str) -> str:
    return subprocess.run([objdump, "--file-headers", path], capture_output=True, text=True, check=True).stdout


def _users(functions: dict[str, list[str]], wanted: re.Pattern[str], *allowed: str) -> list[str]:
    """Functions outside of these namespaces that use such instructions."""
    return sorted(
        f"{name}: {instruction}"
        for name, instructions in functions.items()
        if not ((place := _NAMESPACE.match(name)) and place[1] in allowed)
        for instruction in instructions
        if wanted.search(instruction)
    )


def test_vector_instructions_stay_in_the_namespaces_of_their_instruction_sets(
    functions: dict[str, list[str]],
) -> None:
    assert _users(functions, _AVX, "avx2", "avx512") == []
    assert _users(functions, _AVX512, "avx512") == []


def test_there_is_something_to_find(functions: dict[str, list[str]]) -> None:
    for wanted, allowed, operator in ((_AVX, "avx512", "avx2"), (_AVX512, "avx2", "avx512")):
        users = _users(functions, wanted, allowed)
        for name in ("attend", "linear", "rotate"):
            assert any(f"slipstream::{operator}::{name}(" in user for user in users), (operator, name)
    assert any("slipstream::scalar::linear(" in name for name in functions)


@pytest.fixture
def best_again() -> Iterator[None]:
    yield
    ops.use_instruction_set("auto")


def test_an_instruction_set_can_be_asked_for(instruction_sets: list[str], best_again: None) -> None:
    for name in instruction_sets:
        ops.use_instruction_set(name)
        assert torch.ops.slipstream.cpu_isa() == name
    ops.use_instruction_set("auto")
    assert not instruction_sets or torch.ops.slipstream.cpu_isa() == instruction_sets[0]


def test_one_that_the_processor_lacks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="instruction set is sse9"):
        ops.use_instruction_set("sse9")
