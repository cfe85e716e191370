import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernel_cases, kernels
from bench.errors import BenchError
from bench.kernel_baselines import BufferedAttention, PlainAttention
from bench.kernel_cases import PagePool, measure_case, read_bandwidth, threads
from bench.kernel_report import Comparison, KernelReport, KernelShape, LeftOut, render_report
from bench.machine import describe_machine, last_level_cache_bytes
from cuda_ext import ops
from server.cli import main
from tests.bench.clock import ticking
from tests.bench.kernel_commands import UNCOMPILED, complaint, measure_nothing_else
from tests.one_thread import one_thread

__all__ = ["one_thread"]

SHAPE = KernelShape(heads=4, kv_heads=2, head_dim=8, slots=3, page_size=4, dtype="float32")
DTYPES = ("float32", "bfloat16", "float16")


def test_pages_are_handed_out_once_before_any_comes_again() -> None:
    pool = PagePool(SHAPE, 23)
    tables = pool.tables(context=9, requests=2)
    assert [tuple(table.shape) for table in tables] == [(2, 3)] * 3
    assert tables[0].dtype == torch.int32
    ids = torch.stack(tables).flatten().tolist()
    assert len(set(ids)) == 18 and set(ids) <= set(range(23))
    assert ids != sorted(ids)
    assert pool.keys.shape == (23, 4, 2, 8) and not torch.equal(pool.keys, pool.values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
def test_all_sides_of_a_case_say_the_same(dtype: str, heads: int, kv_heads: int) -> None:
    shape = replace(SHAPE, dtype=dtype, heads=heads, kv_heads=kv_heads)
    # Measured on the way: a case that disagreed would be refused. The last page is half empty.
    row = measure_case(shape, 10, 2, PagePool(shape, 12), repeats=2, bandwidth=1e9)
    assert row.largest_difference < kernel_cases._TOLERANCES[dtype]


def test_a_case_is_medians_of_alternating_runs() -> None:
    # Who goes first changes: operator, SDPA, SDPA with buffers; then SDPA, buffers, operator; then buffers first.
    clock = ticking(2, 8, 1, 9, 6, 3, 4, 4, 4)
    row = measure_case(SHAPE, 10, 2, PagePool(SHAPE, 12), 3, bandwidth=1e3, clock=clock)
    assert row.operator_seconds == 3
    assert row.sdpa == Comparison(seconds=8, speedup=3, speedup_spread=(1, 4))
    assert row.buffered_sdpa == Comparison(seconds=4, speedup=1, speedup_spread=(0.5, 2))
    assert row.kv_bytes == 2 * (10 + 3) * 2 * 2 * 8 * 4
    assert row.gb_per_second == row.kv_bytes / 3 / 1e9
    assert row.bandwidth_share == pytest.approx(row.kv_bytes / 3 / 1e3)


def test_no_run_gets_the_pages_of_the_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    operator, baselines = ops.block_attention, (PlainAttention.__call__, BufferedAttention.__call__)

    def spy_operator(*arguments: Any) -> torch.Tensor:
        seen.append(arguments[5])
        result: torch.Tensor = operator(*arguments)
        return result

    def spy(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def spied(*arguments: Any) -> torch.Tensor:
            seen.append(arguments[3])
            return call(*arguments)

        return spied

    monkeypatch.setattr(ops, "block_attention", spy_operator)
    monkeypatch.setattr(PlainAttention, "__call__", spy(baselines[0]))
    monkeypatch.setattr(BufferedAttention, "__call__", spy(baselines[1]))
    measure_case(SHAPE, 12, 1, PagePool(SHAPE, 6), 4, bandwidth=1e9)
    measured = seen[3:]  # the first ones were compared
    assert len(measured) == 12
    for before, after in pairwise(measured):
        assert not set(before.flatten().tolist()) & set(after.flatten().tolist())


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = ops.block_attention
    for wrong in (lambda *arguments: operator(*arguments) + 0.01, lambda *arguments: operator(*arguments) * math.nan):
        monkeypatch.setattr(ops, "block_attention", wrong)
        with pytest.raises(BenchError, match="differ by (0.01|nan), expected at most 0.0001"):
            measure_case(SHAPE, 10, 2, PagePool(SHAPE, 12), 1, bandwidth=1e9)


def test_a_shape_that_the_operator_refuses_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("head_dim is 8, expected something else\nand where that was found out")

    monkeypatch.setattr(ops, "block_attention", refuse)
    with pytest.raises(BenchError, match="the operator refuses this shape: head_dim is 8, expected something else$"):
        measure_case(SHAPE, 10, 2, PagePool(SHAPE, 12), 1, bandwidth=1e9)


def test_bandwidth_is_that_of_the_best_run() -> None:
    assert read_bandwidth(size=4096, repeats=2, clock=ticking(4, 2, 3, 8)) == 4096 / 2
    assert read_bandwidth(size=4096, repeats=2, clock=ticking(4, 8, 3, 1)) == 4096 / 1


def test_threads_are_given_back() -> None:
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def test_caches_are_counted_once_however_many_cores_share_them(tmp_path: Path) -> None:
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        for index, (level, size, cores) in enumerate((("1", "32K", str(cpu)), ("3", "2048K", shared))):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", cores)):
                (folder / name).write_text(text + "\n")
    assert last_level_cache_bytes(tmp_path) == 2 * 2048 * 1024
    (tmp_path / "cpu3" / "cache" / "index1" / "size").unlink()
    assert last_level_cache_bytes(tmp_path) == 2 * 2048 * 1024
    assert last_level_cache_bytes(tmp_path / "none") is None


def test_cases_that_do_not_fit_are_left_out_and_pages_outgrow_the_caches() -> None:
    page = SHAPE.page_size * SHAPE.token_bytes
    gib = 100 * page / 2**30
    cases = [(40, 1), (40, 5), (200, 1), (201, 1)]
    pages, fitting, left_out = kernels._fitting(SHAPE, cases, gib, cache_bytes=10 * page)
    assert (pages, fitting) == (100, [(40, 1), (40, 5), (200, 1)])
    assert [(case.context, case.requests) for case in left_out] == [(201, 1)]
    assert "two batches of pages are" in left_out[0].reason
    assert kernels._fitting(SHAPE, [(4, 1)], gib, cache_bytes=10 * page)[0] == 20
    with pytest.raises(BenchError, match=r"--max-gib .* is too little: the caches hold"):
        kernels._fitting(SHAPE, [(4, 1)], gib, cache_bytes=60 * page)
    with pytest.raises(BenchError, match=r"no case fits into --max-gib"):
        kernels._fitting(SHAPE, [(201, 1)], gib, cache_bytes=page)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a command that takes no time."""
    measure_nothing_else(monkeypatch)
    shape = ["--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--slots", "3", "--page-size", "4"]
    return ["bench-kernels", "--contexts", "8,64", "--requests", "1,2", "--repeats", "3", "--threads", "1", *shape]


def test_the_command_measures_prints_and_reports(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernels.json"
    # Two batches of two requests with 64 tokens are 32 KiB.
    assert main([*small, "--json", str(path), "--max-gib", str(20 / 2**20), "--dtype", "float32"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith(f"{describe_machine().cpu}, 1 thread, memory read at 2.0 GB/s")
    assert lines[1] == "3 slots, 4 heads, 2 key heads, head_dim 8, float32, pages of 4 tokens; medians of 3"
    assert [line.split()[:2] for line in lines[5:8]] == [["8", "1"], ["8", "2"], ["64", "1"]]
    assert lines[8].startswith("left out: context 64, 2 requests: two batches of pages are 3.05e-05 GiB, --max-gib is ")
    assert captured.err.splitlines()[1:] == [
        "[1/3]  context 8, requests 1",
        "[2/3]  context 8, requests 2",
        "[3/3]  context 64, requests 1",
    ]
    plain = json.loads(path.read_text())
    assert [file.name for file in tmp_path.iterdir()] == ["kernels.json"]
    assert plain["schema_version"] == 1 and plain["complete"] is True
    assert set(plain) >= {"created", "command", "machine", "operator", "operator_compiled", "shape", "threads"}
    assert plain["memory_gb_per_second"] == 2.0 and plain["cache_bytes"] == 4096
    assert [(row["context"], row["requests"]) for row in plain["rows"]] == [(8, 1), (8, 2), (64, 1)]
    assert set(plain["rows"][0]) == {
        *("context", "requests", "operator_seconds", "sdpa", "buffered_sdpa"),
        *("kv_bytes", "gb_per_second", "bandwidth_share", "largest_difference"),
    }
    assert set(plain["rows"][0]["sdpa"]) == {"seconds", "speedup", "speedup_spread"}
    assert plain["left_out"][0]["requests"] == 2


def test_a_report_is_kept_up_to_date_while_it_is_made(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernels.json"

    def interrupted(shape: KernelShape, context: int, *rest: Any) -> Any:
        if context == 64:
            raise KeyboardInterrupt
        return measure_case(shape, context, *rest)

    monkeypatch.setattr(kernel_cases, "measure_case", interrupted)
    assert main([*small, "--json", str(path)]) == 130
    plain = json.loads(path.read_text())
    assert plain["complete"] is False and len(plain["rows"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--heads", "3"], "--heads 3 is not a multiple of --kv-heads 2"),
        (["--slots", "0"], "--slots 0 is not above 0"),
        (["--page-size", "-1"], "--page-size -1 is not above 0"),
        (["--contexts", "8,x"], '--contexts 8,x: "x" is not a whole number above 0'),
        (["--requests", "1,1"], "--requests 1,1: a number is given twice"),
        (["--repeats", "0"], "--repeats 0 is not above 0"),
        (["--threads", "0"], "--threads 0 is not above 0"),
        (["--max-gib", "nan"], "--max-gib nan is not above 0"),
        (["--json", "nowhere/report.json"], "the folder {cwd}/nowhere does not exist"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*small, *changes]) == 2
    assert complaint(capsys).startswith(message.format(cwd=tmp_path))


def test_the_defaults_are_the_default_drafters_shape() -> None:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    assert kernels._shape(parser.parse_args([])) == KernelShape(9, 3, 64, 5, 32, "float32")
    assert KernelShape(9, 3, 64, 5, 32, "float32").token_bytes == 2 * 3 * 64 * 4
    assert KernelShape(9, 3, 64, 5, 32, "bfloat16").token_bytes == 2 * 3 * 64 * 2


def test_a_report_says_when_the_operator_is_not_compiled() -> None:
    row = measure_case(SHAPE, 8, 1, PagePool(SHAPE, 8), 1, bandwidth=1e9, clock=ticking(0.002, 0.005, 0.001))
    report = KernelReport(
        **UNCOMPILED,
        shape=SHAPE,
        rows=(row,),
        left_out=(LeftOut(64, 1, "too large"),),
    )
    lines = render_report(report).splitlines()
    assert lines[0] == "a CPU, 2 threads, memory read at 12.3 GB/s"
    assert lines[2] == (
        "The operator is not compiled (not built; run: this): its times are those of its definition in PyTorch."
    )
    assert lines[5].split() == ["8", "1", "2.000", "5.000", "2.50x", "1.000", "0.50x", "0.00", "0.00", "0%"]
    assert lines[6] == "left out: context 64, 1 request: too large"
    assert render_report(replace(report, operator_compiled=True, operator="fast")).splitlines()[2] == "operator: fast"
