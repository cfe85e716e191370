import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernels, layer_cases, linear_products
from bench.errors import BenchError
from bench.kernel_report import Comparison
from bench.layer_cases import LayerCases, Steps, copies, fitting
from bench.layer_report import LayerReport, LayerRow, LeftOutWeights, render_layer_report
from bench.layer_shape import DEFAULT_SHAPE, LayerShape
from bench.layer_sides import LayerSide, LibrarySide, OperatorSide, memory_bytes, part_bytes
from bench.linear_products import Product, weight_bytes
from bench.machine import describe_machine
from cuda_ext import ops
from cuda_ext.linear import WeightFormat
from server.cli import main
from tests.bench.clock import ticking
from tests.bench.kernel_commands import (
    CONFIG,
    PEAK,
    SHAPE,
    UNCOMPILED,
    complaint,
    measure_nothing_else,
    torch_libraries,
    write_config,
)
from tests.one_thread import one_thread

__all__ = ["one_thread"]

FORMATS = [format.value for format in WeightFormat]


def operators(*formats: str, shape: LayerShape = SHAPE) -> list[LayerSide]:
    return [OperatorSide(name, shape) for name in formats]


def baseline(library: Product | None = None, shape: LayerShape = SHAPE) -> LibrarySide:
    return LibrarySide(library or linear_products._Torch(), shape)


def make_cases(
    sides: Sequence[LayerSide],
    tokens: Sequence[int] = (1,),
    count: int = 1,
    shape: LayerShape = SHAPE,
    context: int = 10,
) -> LayerCases:
    return LayerCases(sides, shape, Steps(shape, context, tokens, page_size=4), count)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_take_the_bytes_that_are_counted(format: str) -> None:
    (side,) = operators(format)
    cases = make_cases([side])
    (model,) = cases._copies[0]
    layers, head = part_bytes(side, SHAPE)
    held = [panels.numel() for layer in model.layers for panels in layer[3]]
    assert len(held) == 8 and sum(held) == layers
    assert model.output_head.num_bytes == head
    assert {name for layer in model.layers for name in layer[5]} == {format}
    assert model.output_head.format == ("q8_0" if format == "q4_1" else format)


@pytest.mark.parametrize("page_size", [4, 16])
def test_a_steps_tokens_stand_behind_the_context(page_size: int) -> None:
    steps = Steps(SHAPE, 10, (1, 5), page_size)
    tables = {tuple(step.block_tables[0].tolist()) for step in steps.all}
    assert len(tables) == 1 and sorted(*tables) == list(range(-(-15 // page_size)))
    assert len(steps.pools) == 2 and not torch.equal(steps.pools[0].keys, steps.pools[1].keys)
    (pages,) = tables
    for step, tokens in zip(steps.all, (1, 5), strict=True):
        positions = list(range(10, 10 + tokens))
        assert step.positions.tolist() == positions
        assert step.slot_mapping.tolist() == [pages[p // page_size] * page_size + p % page_size for p in positions]
        assert step.context_lens.tolist() == [10 + tokens] and step.query_starts.tolist() == [0, tokens]
        assert len(step.rotary_table) > 10 + tokens and step.scale == 0.25
        assert step.hidden.shape == (tokens, 64)
    assert steps.one == 0


@pytest.mark.parametrize("family", [{}, {"qkv_bias": True}, {"head_norms": True}], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
def test_all_sides_say_the_same(family: dict[str, bool], heads: tuple[int, int]) -> None:
    shape = replace(SHAPE, heads=heads[0], kv_heads=heads[1], **family)
    for library in torch_libraries():
        sides = [*operators(*FORMATS, shape=shape), baseline(library, shape)]
        # A side that disagreed would be refused. The last page is half empty.
        differences = make_cases(sides, (1, 5), shape=shape).differences()
        assert set(differences) == {*FORMATS, "baseline"}
        assert max(differences.values()) < 1e-5


@pytest.mark.parametrize("wrong", [1.0, math.nan])
def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    layer, linear = ops.decoder_layer, ops.linear

    def spoilt_layer(hidden: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        added, stream = layer(hidden, *arguments)
        if len(hidden) == 5:
            stream[4, 63] += wrong
        return added, stream

    def spoilt_product(rows: torch.Tensor, *arguments: Any) -> torch.Tensor:
        result: torch.Tensor = linear(rows, *arguments)
        result[-1, -1] += wrong
        return result

    sides = operators("q4_1")
    with monkeypatch.context() as patch:
        patch.setattr(ops, "decoder_layer", spoilt_layer)
        make_cases(sides, (1, 4)).differences()
        with pytest.raises(BenchError, match="q4_1 and a layer's definition .* differ by .* with 5 tokens, expected"):
            make_cases(sides, (1, 5)).differences()
    monkeypatch.setattr(ops, "linear", spoilt_product)
    with pytest.raises(BenchError, match="q8_0 and F.linear on the same numbers differ by .* with 1 rows"):
        make_cases(sides).differences()


def test_a_baseline_that_sees_too_much_is_not_timed() -> None:
    cases = make_cases([baseline()], (1, 3))
    cases._steps.all = [replace(step, mask=torch.ones_like(step.mask)) for step in cases._steps.all]
    with pytest.raises(BenchError, match="baseline and a layer's definition .* with 3 tokens"):
        cases.differences()


def test_a_shape_that_a_side_refuses_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("head_dim is 16, expected something else\nand where that was found out")

    cases = make_cases(operators("int8"))
    monkeypatch.setattr(ops, "decoder_layer", refuse)
    with pytest.raises(BenchError, match="int8 refuses this shape: head_dim is 16, expected something else$"):
        cases.differences()


def rows_of(cases: LayerCases, rounds: Sequence[Sequence[float]], bandwidth: float = 1e3) -> tuple[LayerRow, ...]:
    return cases.rows(rounds, bandwidth, PEAK, {"float32": 0.25, "baseline": 0.5})


def test_rows_are_medians_of_alternating_rounds() -> None:
    cases = make_cases([*operators("float32"), baseline()], (2, 1))
    # Layers and head of the operator, then of the baseline, with two tokens; the same with one token.
    rounds = [[6, 2, 10, 4, 2, 2, 8, 2], [9, 3, 20, 4, 3, 1, 6, 4], [5, 1, 12, 6, 4, 2, 9, 1]]
    # Who goes first changes from round to round.
    clock = ticking(*(seconds for turn, times in enumerate(rounds) for seconds in (*times[turn:], *times[:turn])))
    assert list(cases.rounds(3, clock)) == rounds
    rows = rows_of(cases, rounds)
    assert [(row.weights, row.tokens, row.largest_difference) for row in rows] == [
        *(("float32", 2, 0.25), ("float32", 1, 0.25)),
        *(("baseline", 2, 0.5), ("baseline", 1, 0.5)),
    ]
    two, one, plain_two, plain_one = rows
    assert [part.seconds for part in (two.layers, two.head, two.step)] == [6, 2, 8]
    assert [part.seconds for part in (one.layers, one.head, one.step)] == [3, 2, 4]
    assert [part.seconds for part in (plain_two.layers, plain_two.head, plain_two.step)] == [12, 4, 18]
    assert (two.layers.steps_of_one, two.layers.steps_of_one_spread) == (3, (1.25, 3))
    assert (two.head.steps_of_one, two.head.steps_of_one_spread) == (1, (0.5, 3))
    assert (two.step.steps_of_one, two.step.steps_of_one_spread) == (2, (1, 3))
    assert (one.step.steps_of_one, one.step.steps_of_one_spread) == (1, (1, 1))
    assert plain_two.step.steps_of_one == 1.8
    assert two.baseline == Comparison(seconds=18, speedup=2, speedup_spread=(1.75, 3))
    assert one.baseline == Comparison(seconds=10, speedup=2.5, speedup_spread=(10 / 6, 2.5))
    assert plain_two.baseline is None and plain_one.baseline is None


def test_rates_are_those_of_the_weights_and_the_arithmetic() -> None:
    (row,) = make_cases(operators("q4_1")).rows([[2, 4]], 1e3, PEAK, {"q4_1": 0.0})
    layers = 2 * (128 * 64 + 64 * 64 + 3 * 64 * 96) * 20 // 32
    head = 64 * 64 * 34 // 32
    flops = SHAPE.layers_flops(1, 10)
    assert [part.weight_bytes for part in (row.layers, row.head, row.step)] == [layers, head, layers + head]
    assert row.layers.gb_per_second == layers / 2 / 1e9 and row.layers.gflops == flops / 2 / 1e9
    assert row.head.gb_per_second == head / 4 / 1e9 and row.head.gflops == 2 * 50 * 64 / 4 / 1e9
    assert row.step.bandwidth_share == pytest.approx((layers + head) / 6 / 1e3)
    assert row.step.peak_share == pytest.approx((flops + 2 * 50 * 64) / 6 / 1e9 / 8)
    assert (row.format, row.head_format, row.baseline) == ("q4_1", "q8_0", None)


def test_every_layer_has_its_own_weights_and_pages_and_a_copy_waits_for_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []
    heads: list[int] = []
    layer, linear = ops.decoder_layer, ops.linear

    def spy_layer(*arguments: Any) -> Any:
        seen.append((arguments[3].data_ptr(), *(panels.data_ptr() for panels in arguments[14])))
        assert (arguments[1] is None) == (len(seen) % 2 == 1)
        return layer(*arguments)

    def spy_head(rows: torch.Tensor, panels: torch.Tensor, *rest: Any) -> Any:
        heads.append(panels.data_ptr())
        return linear(rows, panels, *rest)

    cases = make_cases(operators("q8_0"), (1, 2, 3), count=3)
    monkeypatch.setattr(ops, "decoder_layer", spy_layer)
    monkeypatch.setattr(ops, "linear", spy_head)
    assert len(list(cases.rounds(4))) == 4
    assert len(seen) == 24 and len({pages for pages, *_ in seen}) == 2
    assert len({address for _, *weights in seen for address in weights}) == 3 * 2 * 4
    models = [first + second for first, second in zip(seen[::2], seen[1::2], strict=True)]
    assert models == 4 * models[:3] and len(set(models)) == 3
    assert heads == 4 * heads[:3] and len(set(heads)) == 3


def test_layers_feed_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, outputs = [], []
    layer = ops.decoder_layer

    def spy(*arguments: Any) -> Any:
        inputs.append(arguments[:2])
        outputs.append(layer(*arguments))
        return outputs[-1]

    monkeypatch.setattr(ops, "decoder_layer", spy)
    make_cases(operators("float32"), shape=replace(SHAPE, layers=4)).warm_up()
    assert len(inputs) == 4
    for (added, stream), (hidden, residual) in zip(outputs[:-1], inputs[1:], strict=True):
        assert hidden is added and residual is stream


def test_everything_is_run_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, str, int]] = []

    def spy(self: Any, part: str, step: Any) -> None:
        ran.append((id(self), part, step.tokens))

    cases = make_cases([*operators("float32", "int8"), baseline()], (1, 4), count=2)
    monkeypatch.setattr(layer_cases._Copy, "run", spy)
    cases.warm_up()
    assert len(ran) == len(set(ran)) == 2 * 3 * 2 * 2


@pytest.mark.parametrize("cache_bytes", [1, 10**5, 10**6, 10**7])
def test_a_copys_turn_comes_when_the_caches_have_seen_twice_their_size(cache_bytes: int) -> None:
    sides = [*operators("q4_1", "float32"), baseline()]
    parts = [size for side in sides for size in part_bytes(side, SHAPE)]
    count = copies(sides, SHAPE, cache_bytes)
    assert count * sum(parts) - max(parts) >= 2 * cache_bytes
    assert count == 1 or (count - 1) * sum(parts) - max(parts) < 2 * cache_bytes


def test_the_largest_weights_are_left_out_first() -> None:
    shape = replace(SHAPE, hidden=512, intermediate=1024, vocabulary=4096)
    sides = [*operators("float32", "q8_0", "bfloat16", shape=shape), baseline(shape=shape)]
    sizes = {side.name: memory_bytes(side, shape) for side in sides}
    huge = 2 * 2**20
    held = [-(-weight_bytes(WeightFormat.BFLOAT16, weight) // huge) * huge for weight in (*shape.weights, shape.head)]
    assert sizes["bfloat16"] == 2 * sum(held[:4]) + held[4]
    made = 3 * 4 * 4096 * 512
    whole = sum(sizes.values()) + made
    assert fitting(sides, shape, 1, whole) == (sides, [])
    kept, left_out = fitting(sides, shape, 1, whole - 1)
    assert [side.name for side in kept] == ["float32", "q8_0", "bfloat16"]
    assert left_out == [
        LeftOutWeights(
            "baseline",
            f"its weights and those of float32, q8_0, bfloat16 are {whole / 2**30:.3g} GiB, "
            f"--max-gib is {(whole - 1) / 2**30:g}",
        )
    ]
    kept, left_out = fitting(sides, shape, 1, sizes["q8_0"] + made)
    assert [side.name for side in kept] == ["q8_0"]
    assert [case.weights for case in left_out] == ["baseline", "float32", "bfloat16"]
    cache_bytes = sum(part_bytes(sides[1], shape))
    assert copies([sides[1]], shape, cache_bytes) == 3
    assert fitting([sides[1]], shape, cache_bytes, 3 * sizes["q8_0"] + made) == ([sides[1]], [])
    kept, (reason,) = fitting([sides[1]], shape, cache_bytes, 3 * sizes["q8_0"] + made - 1)
    assert not kept and reason.reason.startswith("its weights, 3 times over, are ")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments of a command that takes no time."""
    measure_nothing_else(monkeypatch)
    model = ["--model-config", str(write_config(tmp_path)), "--page-size", "4"]
    steps = ["--tokens", "1,3", "--context", "10", "--formats", "q4_1,float32"]
    return ["bench-kernels", "--kernel", "layer", *model, *steps, "--repeats", "3", "--threads", "1"]


def test_the_command_measures_prints_and_reports(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "layer.json"
    assert main([*small, "--json", str(path)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith(
        f"{describe_machine().cpu}, 1 thread, memory read at 2.0 GB/s, 8 GF/s in a guess, load average before "
    )
    assert lines[1] == (
        "a verify step of one request behind 10 tokens: 2 layers of 64, 96 inside, 4 heads, 2 key heads, head_dim 16; "
        "output head 50x64; float32 keys and values in pages of 4 tokens"
    )
    assert lines[2].startswith("weights of its own for each layer, read from memory; medians of 3 rounds;")
    library = torch_libraries()[-1].name
    assert lines[4].startswith(f"baseline: the same layers of PyTorch's operators, one after the other: {library} with")
    table = [(weights, tokens) for weights in ("q4_1", "float32", "baseline") for tokens in ("1", "3")]
    cells = [line.replace(", head q8_0", "").split() for line in lines[7:13]]
    assert [tuple(row[:2]) for row in cells] == table
    assert [row[5] for row in cells if row[1] == "1"] == ["1.00"] * 3
    assert [row[-2:] for row in cells[4:]] == [["-", "-"]] * 2
    assert lines[13:] == ["not the baseline's: vLLM oneDNN: not here"]
    said = captured.err.splitlines()
    assert said[:2] == ["measuring the memory and the arithmetic", "packing 2 layers: q4_1, float32, baseline"]
    assert said[2] == "warming up" and said[5:] == ["[3/3, 0 s left]"]
    assert [re.sub(r"\d+ s", "some s", line) for line in said[3:5]] == ["[1/3, some s left]", "[2/3, some s left]"]
    plain = json.loads(path.read_text())
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "layer.json"}
    assert list(plain)[:2] == ["schema_version", "kernel"]
    assert plain["schema_version"] == 1 and plain["kernel"] == "layer" and plain["complete"] is True
    assert set(plain) >= {"created", "command", "machine", "operator", "operator_compiled", "threads", "baseline"}
    assert (plain["repeats"], plain["rounds"], plain["copies"]) == (3, 3, 1)
    assert (plain["context"], plain["page_size"]) == (10, 4)
    assert plain["memory_gb_per_second"] == 2.0 and plain["cache_bytes"] == 4096
    assert plain["shape"] == asdict(SHAPE) and plain["peak"] == {"gflops": 8.0, "source": "a guess"}
    assert plain["missing_libraries"] == [{"library": "vLLM oneDNN", "reason": "not here"}]
    assert [(row["weights"], str(row["tokens"])) for row in plain["rows"]] == table
    assert set(plain["rows"][0]) == {
        *("weights", "format", "head_format", "tokens", "layers", "head", "step", "baseline", "largest_difference"),
    }
    assert set(plain["rows"][0]["step"]) == {
        *("seconds", "weight_bytes", "gb_per_second", "bandwidth_share", "gflops", "peak_share"),
        *("steps_of_one", "steps_of_one_spread"),
    }
    assert set(plain["rows"][0]["baseline"]) == {"seconds", "speedup", "speedup_spread"}


def test_one_token_is_measured_in_any_case(small: list[str], tmp_path: Path) -> None:
    path = tmp_path / "layer.json"
    assert main([*small, "--tokens", "5,2", "--formats", "int8", "--json", str(path)]) == 0
    assert [row["tokens"] for row in json.loads(path.read_text())["rows"]] == [1, 5, 2] * 2


def test_a_report_is_kept_up_to_date_while_it_is_made(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "layer.json"
    rounds = LayerCases.rounds

    def interrupted(self: LayerCases, repeats: int) -> Any:
        measured = rounds(self, repeats)
        yield next(measured)
        yield next(measured)
        raise KeyboardInterrupt

    monkeypatch.setattr(LayerCases, "rounds", interrupted)
    assert main([*small, "--json", str(path)]) == 130
    plain = json.loads(path.read_text())
    assert plain["complete"] is False and plain["rounds"] == 2 and len(plain["rows"]) == 6


def test_weights_that_do_not_fit_are_left_out(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # Every weight takes a page of 2 MiB.
    assert main([*small, "--max-gib", str(40 / 1024)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith(
        "left out: baseline: its weights and those of q4_1, float32 are 0.0"
    )
    assert "packing 2 layers: q4_1, float32\n" in captured.err
    assert main([*small, "--max-gib", "1e-9"]) == 2
    assert complaint(capsys).startswith("no weights fit into --max-gib 1e-09: baseline: its weights and those")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--tokens", "0"], '--tokens 0: "0" is not a whole number above 0'),
        (["--tokens", "2,2"], "--tokens 2,2: a number is given twice"),
        (["--context", "0"], "--context 0 is not above 0"),
        (["--page-size", "-1"], "--page-size -1 is not above 0"),
        (["--formats", "float8"], '--formats float8: "float8" is none of float32, bfloat16, float16, int8, q8_0, q4_1'),
        (["--formats", "int8,int8"], "--formats int8,int8: a format is given twice"),
        (["--repeats", "0"], "--repeats 0 is not above 0"),
        (["--model-config", "nowhere.json"], "--model-config nowhere.json: cannot read nowhere.json: No such file or"),
        (["--model-config", "words"], "--model-config words: words is not JSON"),
        (["--model-config", "list"], "--model-config list: list holds no JSON object"),
        (["--model-config", "narrow"], "--model-config narrow: a weight of 128x48 with --formats q4_1: inputs are 48"),
        (["--shapes", "8x8"], "--shapes goes with --kernel linear, not with --kernel layer"),
        (["--heads", "3"], "--heads goes with --kernel attention, not with --kernel layer"),
        (["--kernel", "linear"], "--page-size goes with --kernel attention or layer, not with --kernel linear"),
        (["--kernel", "attention"], "--formats goes with --kernel linear or layer, not with --kernel attention"),
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
    Path("words").write_text("some words")
    Path("list").write_text("[]")
    Path("narrow").write_text(json.dumps(CONFIG | {"hidden_size": 48}))
    assert main([*small, *changes]) == 2
    assert complaint(capsys).startswith(message)


def test_the_defaults_are_the_default_targets() -> None:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    args = parser.parse_args([])
    assert args.model_config is None and args.context == 256 and args.tokens == "1,2,4,6,8,16,32,64"
    assert [str(weight) for weight in (*DEFAULT_SHAPE.weights, DEFAULT_SHAPE.head)] == [
        *("960x576", "576x576", "3072x576", "576x1536", "49152x576")
    ]
    assert DEFAULT_SHAPE.layers == 30


def test_a_report_says_when_the_operator_is_not_compiled() -> None:
    cases = make_cases(operators("float32"))
    report = LayerReport(
        **UNCOMPILED,
        peak=PEAK,
        shape=SHAPE,
        context=10,
        page_size=4,
        baseline="nothing",
        copies=1,
        rounds=1,
        rows=rows_of(cases, [[0.002, 0.003]], bandwidth=1e8),
        left_out=(LeftOutWeights("baseline", "too large"),),
        missing_libraries=(),
    )
    lines = render_layer_report(report).splitlines()
    assert lines[0] == "a CPU, 2 threads, memory read at 12.3 GB/s, 8 GF/s in a guess"
    assert lines[3] == (
        "The operator is not compiled (not built; run: this): its times are those of its definition in PyTorch."
    )
    read = 4 * (2 * (128 * 64 + 64 * 64 + 3 * 64 * 96) + 64 * 64)
    assert lines[7].split() == [
        *("float32", "1", "2.000", "3.000", "5.000", "1.00"),
        *(f"{read / 0.005 / 1e9:.2f}", f"{read / 0.005 / 1e8:.0%}", "0.0", "0%", "-", "-"),
    ]
    assert lines[8] == "left out: baseline: too large"
    compiled = replace(report, operator_compiled=True, operator="fast")
    assert render_layer_report(compiled).splitlines()[3] == "operator: fast"
