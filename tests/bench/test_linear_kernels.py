import argparse
import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import kernels, linear_kernels, linear_products
from bench.errors import BenchError
from bench.kernel_report import Comparison
from bench.linear_cases import Sides, Weights, measure_peak
from bench.linear_products import Product, find_libraries, operator_product, weight_bytes
from bench.linear_report import (
    LeftOutShape,
    LinearReport,
    LinearRow,
    MissingLibrary,
    WeightShape,
    render_linear_report,
)
from bench.machine import describe_machine
from cuda_ext import ops
from cuda_ext.linear import WeightFormat
from server.cli import main
from tests.bench.clock import ticking
from tests.bench.kernel_commands import PEAK, UNCOMPILED, complaint, measure_nothing_else, torch_libraries
from tests.one_thread import one_thread

__all__ = ["one_thread"]

SHAPE = WeightShape(40, 64)
FORMATS = [format.value for format in WeightFormat]


def measured(weights: Weights, rows: int = 3, repeats: int = 1, **changes: Any) -> LinearRow:
    differences = dict.fromkeys(FORMATS, 0.0)
    return weights.measure(rows, repeats, bandwidth=1e3, peak=PEAK, differences=differences, **changes)


@pytest.mark.parametrize("shape", [SHAPE, WeightShape(16, 32), WeightShape(33, 96)], ids=str)
def test_weights_take_the_bytes_that_are_counted(shape: WeightShape) -> None:
    for format in WeightFormat:
        packed = operator_product(format).prepare(torch.randn(shape.out_features, shape.in_features))
        assert weight_bytes(format, shape) == packed.num_bytes, format


def test_all_sides_say_the_same() -> None:
    # A side that disagreed would be refused.
    weights = Sides(FORMATS, torch_libraries(), cache_bytes=1).weights(SHAPE)
    differences = weights.differences((1, 5, 20))
    assert set(differences) == {*FORMATS, *(library.name for library in torch_libraries())}
    assert max(differences.values()) < 1e-5


def test_vllms_product_is_a_side_where_vllm_is_installed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's imports may warn of their own accord
        libraries, missing = find_libraries()
    assert {library.name for library in libraries} | {entry.library for entry in missing} == {
        *("F.linear", "oneDNN", "vLLM oneDNN")
    }
    weights = Sides(["float32"], libraries, cache_bytes=1).weights(SHAPE)
    assert max(weights.differences((1, 20)).values()) < 1e-5


def test_a_missing_library_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "vllm._custom_ops", raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    libraries, missing = find_libraries()
    assert [library.name for library in libraries] == ["F.linear"]
    assert missing[0] == MissingLibrary("oneDNN", "this torch has none")
    assert missing[1].library == "vLLM oneDNN"
    assert missing[1].reason.startswith("vLLM cannot be imported (No module named 'vllm._custom_ops'")
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", ModuleType("vllm._custom_ops"))
    assert find_libraries()[1][1] == MissingLibrary("vLLM oneDNN", "this vLLM has none")


def test_a_case_is_medians_of_alternating_runs() -> None:
    libraries: list[Product] = [linear_products._Torch(), linear_products._Torch()]
    libraries[1].name = "another"  # type: ignore[misc]
    weights = Sides(["float32"], libraries, cache_bytes=1).weights(SHAPE)
    # Who goes first changes: operator, F.linear, another; then F.linear, another, operator; then another first.
    row = measured(weights, rows=3, repeats=3, clock=ticking(2, 8, 1, 9, 6, 3, 4, 4, 4))
    assert (row.shape, row.rows, row.best_library) == (SHAPE, 3, "another")
    flops = 2 * 3 * 40 * 64
    assert [(time.library, time.seconds) for time in row.libraries] == [("F.linear", 8), ("another", 4)]
    assert [time.gflops for time in row.libraries] == [flops / 8 / 1e9, flops / 4 / 1e9]
    (ours,) = row.formats
    assert ours.format == "float32" and ours.seconds == 3
    assert ours.best_library == Comparison(seconds=4, speedup=1, speedup_spread=(0.5, 2))
    assert ours.weight_bytes == 48 * 64 * 4
    assert ours.gb_per_second == ours.weight_bytes / 3 / 1e9
    assert ours.bandwidth_share == pytest.approx(ours.weight_bytes / 3 / 1e3)
    assert ours.gflops == flops / 3 / 1e9 and ours.peak_share == ours.gflops / 8


def test_formats_are_compared_with_the_best_library_each_by_itself() -> None:
    weights = Sides(["int8", "q4_1"], [linear_products._Torch()], cache_bytes=1).weights(SHAPE)
    row = measured(weights, clock=ticking(1, 2, 6))
    assert [(time.format, time.seconds, time.best_library.speedup) for time in row.formats] == [
        ("int8", 1, 6),
        ("q4_1", 2, 3),
    ]


def test_a_copys_turn_comes_when_the_caches_have_seen_twice_their_size() -> None:
    sides = Sides(FORMATS, torch_libraries(), cache_bytes=10**6)
    one_round = sum(weight_bytes(side.format, SHAPE) for side in sides.all)
    assert (sides.copies(SHAPE) - 1) * one_round >= 2 * 10**6 > (sides.copies(SHAPE) - 2) * one_round
    # Larger than any cache: still not the same one twice in a row.
    assert Sides(FORMATS, torch_libraries(), cache_bytes=1).copies(SHAPE) == 2


def test_no_run_gets_a_copy_before_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    linear = F.linear

    def operator(rows: torch.Tensor, panels: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((rest[-1], panels.data_ptr()))
        return rows.new_empty(len(rows), rest[1])

    def library(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(("F.linear", weight.data_ptr()))
        return linear(rows, weight)

    sides = Sides(["float32", "q8_0"], [linear_products._Torch()], cache_bytes=40_000)
    weights = sides.weights(SHAPE)
    copies = sides.copies(SHAPE)
    monkeypatch.setattr(ops, "linear", operator)
    monkeypatch.setattr(F, "linear", library)
    measured(weights, repeats=3 * copies - 1)
    assert copies > 2
    for name in ("float32", "q8_0", "F.linear"):
        turns = [address for side, address in seen if side == name]
        assert len(turns) == 3 * copies and len(set(turns)) == copies
        assert turns == 3 * turns[:copies]


def test_memory_is_that_of_all_copies_in_huge_pages() -> None:
    sides = Sides(["float32"], [linear_products._Torch()], cache_bytes=1)
    shape = WeightShape(1024, 1024)
    assert sides.memory_bytes(shape) == 2 * (4 + 4) * 2**20 + 3 * 4 * 2**20
    assert sides.memory_bytes(SHAPE) == 2 * (2 + 2) * 2**20 + 3 * 4 * 40 * 64


@pytest.mark.parametrize("wrong", ["off", "nan"])
def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    weights = Sides(["int8"], torch_libraries(), cache_bytes=1).weights(SHAPE)
    linear = ops.linear

    def spoilt(rows: torch.Tensor, *arguments: Any) -> torch.Tensor:
        result: torch.Tensor = linear(rows, *arguments)
        if len(rows) == 5:
            result[4, 39] += math.nan if wrong == "nan" else 1
        return result

    monkeypatch.setattr(ops, "linear", spoilt)
    weights.differences((1, 4))
    with pytest.raises(BenchError, match="int8 and F.linear .* differ by .* with 5 rows, expected at most 0.0001"):
        weights.differences((1, 5))


def test_a_shape_that_a_side_refuses_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("panels has 3 bytes, expected 4\nand where that was found out")

    weights = Sides(["float16"], torch_libraries(), cache_bytes=1).weights(SHAPE)
    monkeypatch.setattr(ops, "linear", refuse)
    with pytest.raises(BenchError, match="float16 refuses this shape: panels has 3 bytes, expected 4$"):
        weights.differences((1,))


def test_the_peak_is_that_of_the_best_run() -> None:
    flops, square = 2 * 64 * 128 * 512, 2 * 512**3
    short = [flops / 1e9] * 99
    # 99 runs of the operator at 1 GF/s, one at 5; the matrices at 4 GF/s.
    peak = measure_peak(1, side=512, clock=ticking(*short, flops / 5e9, square / 4e9))
    assert peak.gflops == pytest.approx(5)
    assert peak.source == "the operator with 64 rows and a weight 128x512 in the caches"
    peak = measure_peak(1, side=512, clock=ticking(*short, flops / 3e9, square / 4e9))
    assert peak.gflops == pytest.approx(4) and peak.source == "torch.mm of 512x512 matrices"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a command that takes no time."""
    measure_nothing_else(monkeypatch)
    shapes = ["--shapes", "48x32,32x64", "--rows", "1,3", "--formats", "float32,q4_1"]
    return ["bench-kernels", "--kernel", "linear", *shapes, "--repeats", "3", "--threads", "1"]


def test_the_command_measures_prints_and_reports(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "linear.json"
    assert main([*small, "--json", str(path)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith(
        f"{describe_machine().cpu}, 1 thread, memory read at 2.0 GB/s, 8 GF/s in a guess, load average before "
    )
    assert lines[1] == "weights as outputs x inputs, read from memory; medians of 3"
    cases = [("48x32", "1"), ("48x32", "3"), ("32x64", "1"), ("32x64", "3")]
    table = [(*case, format) for case in cases for format in ("float32", "q4_1")]
    assert [tuple(line.split()[:3]) for line in lines[5:13]] == table
    assert lines[13:] == ["not measured: vLLM oneDNN: not here"]
    assert captured.err.splitlines() == [
        "measuring the memory and the arithmetic",
        *("packing 48x32", "[1/4]  48x32, 1 row", "[2/4]  48x32, 3 rows"),
        *("packing 32x64", "[3/4]  32x64, 1 row", "[4/4]  32x64, 3 rows"),
    ]
    plain = json.loads(path.read_text())
    assert [file.name for file in tmp_path.iterdir()] == ["linear.json"]
    assert list(plain)[:2] == ["schema_version", "kernel"]
    assert plain["schema_version"] == 1 and plain["kernel"] == "linear" and plain["complete"] is True
    assert set(plain) >= {"created", "command", "machine", "operator", "operator_compiled", "threads", "repeats"}
    assert plain["memory_gb_per_second"] == 2.0 and plain["cache_bytes"] == 4096
    assert plain["peak"] == {"gflops": 8.0, "source": "a guess"}
    assert plain["missing_libraries"] == [{"library": "vLLM oneDNN", "reason": "not here"}]
    assert [(row["shape"]["out_features"], row["rows"]) for row in plain["rows"]] == [
        (48, 1),
        (48, 3),
        (32, 1),
        (32, 3),
    ]
    row = plain["rows"][0]
    assert set(row) == {"shape", "rows", "best_library", "libraries", "formats"}
    assert [entry["library"] for entry in row["libraries"]] == [library.name for library in torch_libraries()]
    assert set(row["libraries"][0]) == {"library", "seconds", "gflops"}
    assert [entry["format"] for entry in row["formats"]] == ["float32", "q4_1"]
    assert set(row["formats"][0]) == {
        *("format", "seconds", "best_library", "weight_bytes", "gb_per_second", "bandwidth_share"),
        *("gflops", "peak_share", "largest_difference"),
    }
    assert set(row["formats"][0]["best_library"]) == {"seconds", "speedup", "speedup_spread"}


def test_a_report_is_kept_up_to_date_while_it_is_made(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "linear.json"
    measure = Weights.measure

    def interrupted(self: Weights, rows: int, *rest: Any) -> LinearRow:
        if path.exists() and len(json.loads(path.read_text())["rows"]) == 3:
            raise KeyboardInterrupt
        return measure(self, rows, *rest)

    monkeypatch.setattr(Weights, "measure", interrupted)
    assert main([*small, "--json", str(path)]) == 130
    plain = json.loads(path.read_text())
    assert plain["complete"] is False and len(plain["rows"]) == 3


def test_weights_that_do_not_fit_are_left_out(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small, "--shapes", "48x32,1024x1024", "--rows", "1", "--max-gib", str(20 / 1024)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("left out: 1024x1024: all copies of it are 0.0")
    assert captured.out.splitlines()[-1].endswith(" GiB, --max-gib is 0.0195312")
    assert "[1/1]  48x32, 1 row" in captured.err
    assert main([*small, "--max-gib", "1e-9"]) == 2
    assert "no weight fits into --max-gib 1e-09: all copies" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--shapes", "48"], '--shapes 48: "48" is not OUTPUTSxINPUTS, like 576x1536'),
        (["--shapes", "48x32,0x5"], '--shapes 48x32,0x5: "0x5" is not OUTPUTSxINPUTS'),
        (["--shapes", "48x32x1"], '--shapes 48x32x1: "48x32x1" is not OUTPUTSxINPUTS'),
        (["--shapes", "48x32,48x32"], "--shapes 48x32,48x32: a shape is given twice"),
        (["--shapes", "48x33"], "--shapes 48x33 with --formats q4_1: inputs are 33, expected a multiple of 32"),
        (["--formats", "float8"], '--formats float8: "float8" is none of float32, bfloat16, float16, int8, q8_0, q4_1'),
        (["--formats", "int8,int8"], "--formats int8,int8: a format is given twice"),
        (["--rows", "0"], '--rows 0: "0" is not a whole number above 0'),
        (["--repeats", "0"], "--repeats 0 is not above 0"),
        (["--threads", "-1"], "--threads -1 is not above 0"),
        (["--json", "nowhere/report.json"], "the folder {cwd}/nowhere does not exist"),
        (["--contexts", "8"], "--contexts goes with --kernel attention, not with --kernel linear"),
        (["--kv-heads", "1"], "--kv-heads goes with --kernel attention, not with --kernel linear"),
        (["--kernel", "attention"], "--shapes goes with --kernel linear, not with --kernel attention"),
        (["--kernel", "matrix"], "argument --kernel: invalid choice: 'matrix'"),
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


def test_inputs_that_are_no_whole_blocks_are_fine_without_blocks(small: list[str]) -> None:
    assert main([*small, "--shapes", "20x33", "--formats", "bfloat16,int8"]) == 0


def test_the_defaults_are_all_formats_and_the_default_targets_weights() -> None:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    args = parser.parse_args([])
    assert args.kernel == "attention"
    shapes = linear_kernels._shapes(args.shapes)
    assert args.formats is None and linear_kernels.weight_formats(linear_kernels._FORMATS) == FORMATS
    hidden, inner, vocabulary, key_heads, head_dim = 576, 1536, 49152, 3, 64
    assert shapes[:5] == [
        WeightShape(hidden + 2 * key_heads * head_dim, hidden),
        WeightShape(hidden, hidden),
        WeightShape(2 * inner, hidden),
        WeightShape(hidden, inner),
        WeightShape(vocabulary, hidden),
    ]


def test_a_report_says_when_the_operator_is_not_compiled() -> None:
    weights = Sides(["float32"], [linear_products._Torch()], cache_bytes=1).weights(SHAPE)
    row = measured(weights, rows=1, clock=ticking(0.002, 0.005))
    report = LinearReport(
        **UNCOMPILED,
        peak=PEAK,
        rows=(row,),
        left_out=(LeftOutShape(WeightShape(5, 7), "too large"),),
        missing_libraries=(),
    )
    lines = render_linear_report(report).splitlines()
    assert lines[0] == "a CPU, 2 threads, memory read at 12.3 GB/s, 8 GF/s in a guess"
    assert lines[2] == (
        "The operator is not compiled (not built; run: this): its times are those of its definition in PyTorch."
    )
    share = f"{48 * 64 * 4 / 0.002 / 1e3:.0%}"
    assert lines[5].split() == [
        *("40x64", "1", "float32", "2.000", "F.linear", "5.000", "2.50x", "0.01", share, "0.0", "0%")
    ]
    assert lines[6] == "left out: 5x7: too large"
    compiled = replace(report, operator_compiled=True, operator="fast")
    assert render_linear_report(compiled).splitlines()[2] == "operator: fast"
