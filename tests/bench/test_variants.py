from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cli
from bench.errors import BenchError
from bench.methods import METHODS, EngineSettings, Launch, Method
from bench.report import Report, read_report
from bench.variants import variant_methods
from server.flags import add_settings_flags, settings_of
from server.parser import Parser
from tests.bench.fakes import fake_method, fake_methods, parse, write_model, write_prompts

SHARED = EngineSettings(Path("/models/target"), engine_args=("--engine.seed=1",))


def test_a_variant_is_our_engine_with_some_settings_more() -> None:
    short, floor = variant_methods(
        ["short: speculation.max_draft_tokens=2 , engine.prefix_caching=false", "floor:speculation.survival_floor=0"],
        METHODS,
    )
    ours = METHODS["slipstream"].launch(SHARED, 8123)
    assert (short.name, floor.name) == ("short", "floor")
    assert short.launch(SHARED, 8123).command == (
        *ours.command,
        "--speculation.max_draft_tokens=2",
        "--no-engine.prefix_caching",
    )
    assert floor.launch(SHARED, 8123).command == (*ours.command, "--speculation.survival_floor=0")
    assert short.settings == {"speculation.max_draft_tokens": "2", "engine.prefix_caching": "false"}
    assert short.summary == "our engine with speculation.max_draft_tokens=2, engine.prefix_caching=false"
    assert not short.plain
    assert floor.title == "floor (speculation.survival_floor=0)"


def test_the_server_understands_a_variant() -> None:
    (variant,) = variant_methods(["x:speculation.max_draft_tokens=2,engine.prefix_caching=False"], METHODS)
    parser = Parser()
    add_settings_flags(parser)
    settings = settings_of(parser.parse_args(variant.launch(SHARED, 1).command[4:]), environ={})
    assert settings.speculation.enabled
    assert (settings.speculation.max_draft_tokens, settings.engine.prefix_caching) == (2, False)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([":speculation.max_draft_tokens=2"], "a name is needed in front of the colon"),
        ([" :speculation.max_draft_tokens=2"], "a name is needed in front of the colon"),
        (["a\nb:speculation.max_draft_tokens=2"], "a name is needed in front of the colon"),
        (["x:engine.seed=1", "x:engine.seed=2"], 'the name "x" is taken already'),
        (["ar:engine.seed=1"], 'the name "ar" is taken already'),
        (["x"], 'expected section.name=value behind the colon, got ""'),
        (["x:"], 'expected section.name=value behind the colon, got ""'),
        (["x:engine.seed"], 'expected section.name=value behind the colon, got "engine.seed"'),
        (["x:engine.seed="], 'expected section.name=value behind the colon, got "engine.seed="'),
        (["x:=1"], 'expected section.name=value behind the colon, got "=1"'),
        (["x:engine.seed=1,"], 'expected section.name=value behind the colon, got ""'),
        (["x:engine.seed=1,engine.seed=2"], "engine.seed is given twice"),
        (["x:speculation.max_draft_token=1"], "nearest known setting: speculation.max_draft_tokens"),
        (["x:speculation.max_draft_tokens=99"], "speculation.max_draft_tokens = '99' is not allowed"),
    ],
)
def test_mistakes(texts: Sequence[str], message: str) -> None:
    with pytest.raises(BenchError) as error:
        variant_methods(texts, METHODS)
    assert str(error.value).startswith(f'--variant "{texts[-1]}": ')
    assert message in str(error.value)


def bench(folder: Path, methods: Mapping[str, Method], *arguments: str) -> tuple[int, Report]:
    common = ["--prompts", str(write_prompts(folder)), "--model", str(write_model(folder))]
    common += ["--output", str(folder / "report.json"), "--max-tokens", "9", "--repeats", "1", "--concurrency", "1"]
    return cli.run(parse([*common, *arguments]), methods), read_report(folder / "report.json")


def test_variants_are_measured_after_the_methods_and_reported_like_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched: list[tuple[str, ...]] = []
    methods = dict(fake_methods(tmp_path))
    base = methods["slipstream"]

    def launch(settings: EngineSettings, port: int) -> Launch:
        launched.append(settings.engine_args)
        return base.launch(settings, port)

    methods["slipstream"] = replace(base, launch=launch)
    prompts = tmp_path / "prompts.jsonl"
    monkeypatch.setattr("sys.argv", ["/opt/bin/slipstream", "bench", "--prompts", str(prompts)])
    settings = "speculation.max_draft_tokens=2,speculation.survival_floor=0"
    code, report = bench(
        tmp_path, methods, "--methods", "ar", "--variant", f"a b:{settings}", "--variant", "a_b:engine.seed=3",
        "--engine-arg=--engine.seed=9", "--logs", str(tmp_path),
    )  # fmt: skip
    assert code == 0
    assert launched == [
        ("--engine.seed=9", "--speculation.max_draft_tokens=2", "--speculation.survival_floor=0"),
        ("--engine.seed=9", "--engine.seed=3"),
    ]
    assert [entry.name for entry in report.methods] == ["ar", "a b", "a_b"]
    assert report.methods[0].settings == {}
    assert report.methods[1].settings == {"speculation.max_draft_tokens": "2", "speculation.survival_floor": "0"}
    assert [row.method for row in report.rows if row.category == "all"] == ["ar", "a b", "a_b"]
    assert report.rows[-1].speed_vs_ar is not None and report.rows[-1].emitted_per_verify_step == 3.0
    assert {path.name for path in tmp_path.glob("*.log")} == {"ar.log", "a_b.log", "a_b-2.log"}
    captured = capsys.readouterr()
    assert "\na b: speculation.max_draft_tokens=2, speculation.survival_floor=0\n" in captured.out
    assert "a_b (engine.seed=3): starting (3 of 3)" in captured.err
    # A report is published; whose folders the files lay in is nobody's business.
    assert report.command == ("slipstream", "bench", "--prompts", "prompts.jsonl")
    assert report.settings.prompts == "prompts.jsonl"


def test_variants_may_stand_alone(tmp_path: Path) -> None:
    methods = {"slipstream": fake_method(tmp_path, "slipstream")}
    code, report = bench(tmp_path, methods, "--methods", "", "--variant", "x:engine.seed=3")
    assert code == 0
    assert [entry.name for entry in report.methods] == ["x"]


def test_a_malformed_variant_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompts", str(write_prompts(tmp_path)), "--model", str(write_model(tmp_path)), "--variant", "x:y"]
    assert cli.run(parse(arguments)) == 2
    assert capsys.readouterr().err == (
        'slipstream: error: --variant "x:y": expected section.name=value behind the colon, got "y"\n'
    )


@pytest.mark.parametrize("form", ["--prompts={}", "{}"])
def test_the_recorded_command_has_no_folder_of_the_prompts(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr("sys.argv", ["slipstream", "bench", form.format("../data/p.jsonl"), "--limit", "3"])
    assert cli._recorded_command("../data/p.jsonl", {}) == (
        "slipstream",
        "bench",
        form.format("p.jsonl"),
        "--limit",
        "3",
    )
