"""The CUDA kernels' own source, compiled for the host, where threads are threads and shared memory is memory.

What this cannot show: that the kernels run on a GPU at all, how fast, and that the PTX instructions do what their twins
in ``host_shim/warp_twins.h`` do. The last tests compile the sources for GPUs and read what the compiler says.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cuda_ext import ops, reference
from tests.cuda_ext.host_shim.binding_process import call_all
from tests.cuda_ext.host_shim.builds import (
    TORCH_FLAGS,
    Programs,
    barriers,
    builds,
    head_dims,
    require_compiler,
    run_compiler,
)
from tests.cuda_ext.host_shim.cases import BATCH, CASES, HEAD_DIMS, WATCHED
from tests.cuda_ext.host_shim.runner import CUDA_SOURCES, DTYPES, Device, outputs_of, run_cases
from tests.cuda_ext.oracle import Case

FULL = os.environ.get("SLIPSTREAM_TEST_FULL") == "1"
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    require_compiler()
    programs = Programs(tmp_path_factory.mktemp("cuda_source"), builds())
    yield programs
    programs.close()


def check(actual: torch.Tensor, case: Case) -> None:
    names = ("query", "block_key", "block_value", "key_cache", "value_cache")
    widened = replace(case, **{name: getattr(case, name).double() for name in names})
    expected = reference.block_attention(*widened.arguments)
    assert actual.dtype == case.query.dtype
    bound = _TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound)


@pytest.fixture(scope="module")
def outputs(programs: Programs) -> dict[str, torch.Tensor]:
    return dict(zip(CASES, outputs_of(programs.program("plain"), list(CASES.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_definition(outputs: dict[str, torch.Tensor], name: str) -> None:
    check(outputs[name], CASES[name])


def test_what_the_device_cannot_check_is_cut(programs: Programs) -> None:
    """Nothing beyond the block table and the slots is read, whatever lengths and counts say; negative ones are zero."""
    case = replace(BATCH, context_lens=(16, 16, 3), visible=((4, 4), (1, 2), (0, 0)), page_size=16).make()
    table = case.block_tables[:, :1].contiguous()
    beyond = replace(
        case,
        block_tables=table,
        context_lens=torch.tensor([2**31 - 1, 17, -5], dtype=torch.int32),
        visible=torch.tensor([[5, 2**31 - 1], [1, 2], [-1, -(2**31)]], dtype=torch.int32),
    )
    cut = replace(case, block_tables=table, context_lens=torch.tensor([16, 16, 0], dtype=torch.int32))
    first, second = outputs_of(programs.program("plain"), [beyond, cut])
    assert torch.equal(first, second)


@pytest.mark.parametrize("copies_late", [False, True], ids=["copies at once", "copies late"])
def test_memory_is_used_within_its_bounds(programs: Programs, copies_late: bool) -> None:
    """Nothing is read or written outside of what was allocated, nothing misaligned, and nothing overflows."""
    names = WATCHED if copies_late else WATCHED[:3]
    outputs = outputs_of(programs.program("memory"), [CASES[name] for name in names], Device(copies_late=copies_late))
    for name, output in zip(names, outputs, strict=True):
        check(output, CASES[name])


def test_threads_do_not_race(programs: Programs) -> None:
    names = WATCHED[::2]
    outputs = outputs_of(programs.program("threads"), [CASES[name] for name in names], Device(copies_late=False))
    for name, output in zip(names, outputs, strict=True):
        check(output, CASES[name])


def test_there_are_barriers_to_remove() -> None:
    assert len(barriers()) == 2


# Zeros in fresh shared memory are pointers to absent rows for the kernel, so that a mutant gets far enough.
_TOLERANT = Device(copies_late=False, poison=0)


@pytest.mark.parametrize("mutant", [f"without barrier {index}" for index in range(len(barriers()))])
def test_without_a_barrier_threads_race(programs: Programs, mutant: str) -> None:
    outcome = run_cases(programs.program(mutant), [CASES["chunks that are dealt out"]], _TOLERANT)
    assert "ThreadSanitizer: data race" in outcome.words


def test_copies_that_are_not_waited_for_are_missing(programs: Programs) -> None:
    (output,) = outputs_of(programs.program("without waiting"), [CASES["tiles"]])
    with pytest.raises(AssertionError, match="not close"):
        check(output, CASES["tiles"])


def test_the_definition_on_a_gpu() -> None:
    if not (torch.cuda.is_available() and ops.kernels().cuda_compiled):
        pytest.skip("no GPU with compiled kernels: the kernels were not run as they are")
    for case in CASES.values():
        check(ops.block_attention(*(a.cuda() if torch.is_tensor(a) else a for a in case.arguments)).cpu(), case)


# A token must not depend on who else is served: equal bits, whatever stands beside a row.


@pytest.fixture(scope="module")
def batch() -> Case:
    return BATCH.make()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_do_not_matter(programs: Programs, dtype: torch.dtype) -> None:
    batch = replace(BATCH, dtype=dtype).make()
    orders: list[tuple[int, ...]] = [(0,), (1,), (2,), (3,), (3, 2, 1, 0), (1, 0), (2, 2, 3)]
    whole, *rest = outputs_of(programs.program("plain"), [batch, *(batch.requests(*order) for order in orders)])
    for order, output in zip(orders, rest, strict=True):
        assert torch.equal(output, whole[list(order)]), order


def test_other_queries_do_not_matter(programs: Programs, batch: Case) -> None:
    chosen = ((0,), (3,), (1, 2), (3, 2, 1, 0), (3,) * 22)
    whole, *rest = outputs_of(programs.program("plain"), [batch, *(batch.queries(*c) for c in chosen)])
    for queries, output in zip(chosen, rest, strict=True):
        assert torch.equal(output, whole[:, list(queries)]), queries


def test_the_width_of_the_block_table_and_the_size_of_the_device_do_not_matter(programs: Programs, batch: Case) -> None:
    wide = torch.full((4, 400), -7, dtype=torch.int32)
    wide[:, : batch.block_tables.shape[1]] = batch.block_tables
    wider = replace(batch, block_tables=wide)
    (whole,) = outputs_of(programs.program("plain"), [batch])
    for multiprocessors in (1, 100):
        assert torch.equal(outputs_of(programs.program("plain"), [wider], Device(multiprocessors))[0], whole)


def test_slots_that_nobody_sees_do_not_matter(programs: Programs, batch: Case) -> None:
    first = batch.queries(0, 1)
    keys, values = batch.block_key[:, :2].contiguous(), batch.block_value[:, :2].contiguous()
    fewer = replace(first, block_key=keys, block_value=values)
    one, other = outputs_of(programs.program("plain"), [first.requests(0, 1, 2), fewer.requests(0, 1, 2)])
    assert torch.equal(one, other)


# The launch plan.

_PLAN = ("chunks", "row_tiles", "blocks_x", "blocks_y", "shared_bytes", "combine_blocks")
_SIZES = ("scratch_floats", "scratch_outputs", "tokens")


def numbers_of(programs: Programs, *arguments: object) -> list[int]:
    command = [str(programs.program("plain")), *map(str, arguments)]
    return [int(number) for number in subprocess.run(command, capture_output=True, check=True).stdout.split()]


def plan(programs: Programs, *shape: int, multiprocessors: int = 132) -> dict[str, int]:
    """Of requests, queries, heads, kv_heads, head_dim, max_pages, page_size, element_size."""
    return dict(zip(_PLAN + _SIZES, numbers_of(programs, "plan", *shape, multiprocessors), strict=True))


def test_chunks_have_fixed_boundaries(programs: Programs) -> None:
    """Eight chunks of 256 tokens, eight of 512, and so on; a context has those that it reaches into, at least one."""
    begins = [0]
    while begins[-1] < 300_000:
        begins.append(begins[-1] + (256 << (len(begins) - 1) // 8))
    for tokens in (0, 1, 255, 256, 257, 2048, 2049, 2560, 2561, 131_072, 262_144):
        count = max(1, sum(begin < tokens for begin in begins))
        assert numbers_of(programs, "chunks", tokens) == begins[: count + 1], tokens


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("element_size", [2, 4])
def test_shared_memory_suffices_and_is_what_any_gpu_has(programs: Programs, head_dim: int, element_size: int) -> None:
    made = plan(programs, 2, 8, 8, 2, head_dim, 4, 16, element_size)
    row = head_dim * element_size + 16
    assert made["tokens"] % (8 if element_size == 4 else 16) == 0
    assert made["shared_bytes"] == (64 + 4 * made["tokens"]) * row + 2 * made["tokens"] * 16
    assert made["shared_bytes"] <= 99 * 1024


def test_a_plan_covers_every_row_and_chunk(programs: Programs) -> None:
    made = plan(programs, 3, 20, 8, 2, 128, 128, 32, 2)
    assert made["row_tiles"] == 2 and made["blocks_x"] == 3 * 2 * 2
    assert made["chunks"] == 12 and made["combine_blocks"] == 3 * 20 * 8 // 4
    assert made["scratch_outputs"] == 3 * 20 * 8 * 12 * 128
    assert made["scratch_floats"] == 3 * 20 * 8 * 12 * 129


def test_a_single_chunk_needs_no_second_kernel(programs: Programs) -> None:
    made = plan(programs, 3, 8, 8, 2, 128, 8, 32, 2)
    assert (made["chunks"], made["blocks_y"]) == (1, 1)
    assert (made["combine_blocks"], made["scratch_floats"]) == (0, 0)


@pytest.mark.parametrize(("requests", "expected"), [(1, 49), (4, 33), (8, 17), (64, 8)])
def test_chunks_are_dealt_out_once_the_device_is_full(programs: Programs, requests: int, expected: int) -> None:
    made = plan(programs, requests, 8, 32, 8, 128, 8192, 16, 2)
    assert made["chunks"] == 49 and made["blocks_y"] == expected


# What the compiler for GPUs says.


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library for CUDA devices and the words of its compiler."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc: it was not checked that the kernels compile for GPUs, nor that their registers suffice")
    library = tmp_path_factory.mktemp("nvcc") / "slipstream_cuda.so"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)]
    flags = ["-std=c++17", "-O3", "--threads", "2", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    sources = [CUDA_SOURCES / "block_attention.cu", CUDA_SOURCES / "bindings.cpp"]
    dims = head_dims(*(HEAD_DIMS if FULL else (64, 128)))
    return library, run_compiler(
        ["nvcc", *flags, *targets, "-Xptxas", "-v", dims, *sources, *TORCH_FLAGS, "-o", library]
    )


def test_nothing_spills_on_any_gpu(compiled: tuple[Path, str]) -> None:
    entry = r"entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(entry, compiled[1], re.DOTALL)
    kernels = (len(HEAD_DIMS) if FULL else 2) * 3 + 3
    assert {arch: sum(arch == of for _, of, *_ in found) for arch in ("sm_80", "sm_90", "sm_100")} == {
        "sm_80": kernels,
        "sm_90": kernels,
        "sm_100": kernels,
    }
    assert [spill for spill in found if spill[2:] != ("0", "0")] == []


def test_the_compiler_has_nothing_to_warn_of(compiled: tuple[Path, str]) -> None:
    assert "warning" not in compiled[1]


def test_the_library_loads_and_takes_cuda_tensors_only(compiled: tuple[Path, str]) -> None:
    (refusal,) = call_all(compiled[0], [CASES["one slot"].arguments])
    assert isinstance(refusal, str) and "query is not on a CUDA device" in refusal
