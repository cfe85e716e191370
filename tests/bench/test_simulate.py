import json
from pathlib import Path

import pytest

from bench import simulate
from bench.simulate_options import SimulateOptions
from bench.simulate_policies import DEFAULT_TABLE, default_policies, find_policies
from bench.simulate_report import Load, SimulatedRow
from scheduler.cost import CostModel, save_cost_model
from scheduler.trace import DraftRecord, TraceWriter
from server.cli import main
from server.progress import Progress
from tests.bench.kernel_commands import complaint
from tests.bench.synthetic_drafts import synthetic_trace

SLOTS = 4
GPU = ["--gpu", "A100", "--target-params", "8", "--drafter-params", "0.5"]
SHORT = ["--concurrency", "1,8", "--warm-up", "20", "--steps", "30", "--drafts", "1"]


def write_trace(path: Path, changes: dict[int, DraftRecord] | None = None) -> Path:
    """A synthetic trace of 20 requests."""
    trace, _ = synthetic_trace(20, 10, SLOTS, 0.7)
    with TraceWriter(path, trace.header) as writer:
        for number, draft in enumerate(trace.drafts):
            writer.write((changes or {}).get(number, draft))
    return path


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Arguments of a command that takes no time."""
    return ["simulate", "--trace", str(write_trace(tmp_path / "t.jsonl")), *SHORT]


def test_the_command_prints_a_table_a_report_and_a_plot(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, plot = tmp_path / "r.json", tmp_path / "p.svg"
    monkeypatch.setattr("sys.argv", ["/bin/slipstream", *arguments, f"--json={report}"])
    assert main([*arguments, *GPU, "--objective-ms", "20", "--json", str(report), "--plot", str(plot)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "SIMULATED: recorded drafts replayed on step times that are the bounds of a data sheet"
    assert lines[1] == (
        "trace t.jsonl: 200 drafts of 20 requests, target a target, drafter a drafter, recorded with fixed:4"
    )
    for assumed in ("gpu A100", "bandwidth_bytes_per_second 2.039e+12", "efficiency 0.7", "prompts take no time"):
        assert assumed in f"{lines[2]} {lines[3]}"
    policies = [*default_policies(SLOTS).split(","), "oracle: expected", "oracle: clairvoyant"]
    assert [line[: line.index("  ")] for line in lines[6:-2]] == ["1 at once"] * len(policies) + ["8 at once"] * len(
        policies
    )
    assert "simulating: 100% 8 at once, oracle: clairvoyant" in captured.err

    plain = json.loads(report.read_text())
    assert list(plain)[:3] == ["schema_version", "simulated", "complete"]
    assert plain["simulated"] is True and plain["complete"] is True and plain["schema_version"] == 1
    assert [row["policy"] for row in plain["rows"]] == policies * 2
    assert [row["load"]["concurrency"] for row in plain["rows"]] == [1] * len(policies) + [8] * len(policies)
    rows = {(row["policy"], row["load"]["concurrency"]): row for row in plain["rows"]}
    none, oracle, fixed = rows["none", 8], rows["oracle: expected", 8], rows["fixed:2", 8]
    assert (none["verified_per_step"], none["tokens_per_step"], none["speedup"], none["mean_requests"]) == (0, 1, 1, 8)
    assert none["regret"] == pytest.approx(1 - none["tokens_per_second"] / oracle["tokens_per_second"])
    assert oracle["regret"] == 0 and rows["oracle: clairvoyant", 8]["regret_clairvoyant"] == 0
    assert fixed["speedup"] == pytest.approx(fixed["tokens_per_second"] / none["tokens_per_second"])
    assert 0 <= fixed["goodput"] <= fixed["tokens_per_second"] == fixed["tokens"] / fixed["seconds"]
    assert plain["settings"]["objective_seconds"] == 0.02
    assert plain["command"] == ["slipstream", "simulate", "--trace", "t.jsonl", *SHORT, "--json=r.json"]
    assert str(tmp_path) not in report.read_text()

    picture = plot.read_text()
    assert picture.startswith("<?xml") and "Simulated: t.jsonl on the step times of A100" in picture
    for policy in policies:
        assert f">{policy}<" in picture
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.svg", "r.json", "t.jsonl"]


def test_equal_seeds_give_equal_outputs(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        plot = tmp_path / f"{name}.html"
        policies = ["--policies", "adaptive,fixed:2"]
        assert main([*arguments, *GPU, *policies, "--seed", str(seed), "--plot", str(plot)]) == 0
        outputs.append((capsys.readouterr().out, plot.read_text()))
    assert outputs[0] == outputs[1]
    assert outputs[0][0] != outputs[2][0] and outputs[0][1] != outputs[2][1]
    page = outputs[0][1]
    assert page.startswith("<!DOCTYPE html>") and "<title>Simulated draft policies</title>" in page
    assert page.count("<svg") == 1 and page.endswith("</svg>\n</body></html>\n")


def test_requests_may_come_at_a_rate(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, *GPU, "--concurrency", "", "--rates", "0.5,3", "--policies", "fixed:2"]) == 0
    out = capsys.readouterr().out
    assert "\n0.5/s" in out and "\n3/s" in out and "regret  " not in out


def test_a_saved_cost_model_says_what_steps_cost(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cost.json"
    save_cost_model(path, "this machine", CostModel(64))
    assert main([*arguments, "--cost", str(path), "--policies", "none"]) == 0
    out = capsys.readouterr().out
    assert "step times that are a learned cost model's predictions" in out
    assert "cost: kind learned, file cost.json, identity this machine, steps 0, most_tokens 64" in out


def test_traces_are_replayed_together(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_trace(tmp_path / "u.jsonl")
    assert main([*arguments, "--trace", str(other), *GPU, "--policies", "none"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[1:3]] == [
        "trace t.jsonl",
        "trace u.jsonl",
    ]


def test_a_censored_trace_is_refused_or_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = DraftRecord("r0", 0.0, 100, ((0.9, 0.8, 0.7), ()), 0, 1, 1)
    path = write_trace(tmp_path / "t.jsonl", {0: short})
    command = ["simulate", "--trace", str(path), *SHORT, *GPU, "--policies", "none"]
    assert main(command) == 2
    assert complaint(capsys) == (
        f"{path}: of 1 of 200 drafts the outcome is not known to the end, because fixed:4 verified less than was "
        "offered; record with the policy fixed, or give --censored\n"
    )
    assert main([*command, "--censored"]) == 0
    assert "fixed:4; 1 of unknown outcome, all drafts are cut to what was verified" in capsys.readouterr().out


def test_a_report_is_kept_up_to_date_while_it_is_made(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = simulate._rows

    def interrupted(options: SimulateOptions, load: Load, progress: Progress) -> list[SimulatedRow]:
        if load.concurrency == 8:
            raise KeyboardInterrupt
        return rows(options, load, progress)

    monkeypatch.setattr(simulate, "_rows", interrupted)
    path = tmp_path / "r.json"
    assert main([*arguments, *GPU, "--policies", "none", "--json", str(path)]) == 130
    plain = json.loads(path.read_text())
    assert plain["complete"] is False and len(plain["rows"]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "either --cost or --gpu is needed, to say what a step costs"),
        ([*GPU, "--cost", "x"], "either --cost or --gpu is needed, to say what a step costs"),
        (["--gpu", "A100", "--drafter-params", "1"], "--target-params is needed with --gpu"),
        (["--cost", "x", "--target-params", "1"], "--target-params goes with --gpu, not with --cost"),
        (["--cost", "none.json"], "cannot read the step times none.json: No such file or directory"),
        ([*GPU, "--gpu", "GTX"], "--gpu GTX: known are H200, H100, A100, L40S, L4, A10, RTX 4090, RTX 3090"),
        ([*GPU, "--drafter-params", "-1"], "--drafter-params -1 is not above 0"),
        ([*GPU, "--efficiency", "1.5"], "--efficiency 1.5 is more than all, 1"),
        ([*GPU, "--step-overhead-ms", "-1"], "--step-overhead-ms -1 is negative or not finite"),
        ([*GPU, "--trace", "none.jsonl"], "cannot read the trace none.jsonl: No such file or directory"),
        ([*GPU, "--policies", "best"], '--policies: "best" is unknown; known are none: no drafts; fixed:K'),
        ([*GPU, "--policies", "fixed:5"], "--policies: fixed:5 needs a whole number from 0 to 4, the longest recorded"),
        ([*GPU, "--policies", "floor:2"], "--policies: floor:2 needs a probability from 0 to 1, as in floor:0.12"),
        ([*GPU, "--policies", "adl:0"], "--policies: adl:0 needs a whole number from 1 to 4"),
        ([*GPU, "--policies", "none,none"], "--policies: none is given twice"),
        ([*GPU, "--table", "2=1"], "--table 2=1: a table of draft lengths must start at 1 request"),
        ([*GPU, "--table", "1=1,x"], '--table 1=1,x: "x" is not one more entry REQUESTS=TOKENS'),
        ([*GPU, "--table", "1=1,1=2"], '--table 1=1,1=2: "1=2" is not one more entry REQUESTS=TOKENS'),
        ([*GPU, "--concurrency", "0"], '--concurrency 0: "0" is not a whole number above 0'),
        ([*GPU, "--concurrency", "5000"], "--concurrency: 5000 is more than 4096"),
        ([*GPU, "--concurrency", ""], "--concurrency or --rates must name a load"),
        ([*GPU, "--rates", "1,x"], '--rates 1,x: "x" is not a number above 0'),
        ([*GPU, "--steps", "0"], "--steps 0 is not above 0"),
        ([*GPU, "--warm-up", "-1"], "--warm-up -1 is negative or not finite"),
        ([*GPU, "--noise", "nan"], "--noise nan is negative or not finite"),
        ([*GPU, "--plot", "x.png"], "--plot x.png: the name must end in .svg or .html"),
        ([*GPU, "--plot", "x.svg", "--concurrency", "", "--rates", "1"], "--plot shows loads of --concurrency, and"),
        ([*GPU, "--json", "nowhere/r.json"], "the folder {cwd}/nowhere does not exist"),
        ([*GPU, "--steps", "x"], "argument --steps: invalid int value: 'x'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, *changes]) == 2
    assert complaint(capsys).startswith(message.format(cwd=tmp_path))


def test_a_damaged_trace_is_named_with_its_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(path.read_text()[:-5])
    assert main([*arguments, *GPU]) == 2
    assert complaint(capsys).startswith(f"{path}:201: the file ends in the middle of this line")


def test_the_default_policies_fit_any_longest_draft() -> None:
    for slots in (1, 2, 7, 16):
        names = [policy.name for policy in find_policies(default_policies(slots), slots, DEFAULT_TABLE)]
        assert [name for name in names if name.startswith("fixed")] == [
            f"fixed:{k}" for k in range(1, min(slots, 7) + 1)
        ]


def test_a_load_says_what_it_is() -> None:
    assert str(Load(rate=2.5)) == "2.5/s" and str(Load(concurrency=3)) == "3 at once"
