import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench.client import Answer
from bench.errors import BenchError
from bench.machine import Machine, describe_machine
from bench.measures import CellResult, build_rows
from bench.methods import METHODS
from bench.plan import Cell
from bench.report import Failure, MethodEntry, Report, Settings, read_report, write_report


def report() -> Report:
    answer = Answer("text", 3, 10, 0.1, 0.01, 0.2)
    cells = [CellResult(Cell(repeat, 1, "math", name), (answer,), 1.0) for repeat in range(2) for name in METHODS]
    return Report(
        complete=True,
        created="2026-01-02T03:04:05+00:00",
        command=("slipstream", "bench"),
        machine=Machine("a CPU", ("avx2", "fma"), 2, 7.5, None, "Linux 6", "3.11.7", "2.13.0", None, "0.1.0", None),
        settings=Settings(
            model="~/model",
            dtype="float32",
            max_model_len=2048,
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            block_size=32,
            kv_cache_gib=1.0,
            vllm_args=(),
            engine_args=("--x=1",),
            prompts="prompts.jsonl",
            prompts_sha256="00",
            prompts_per_category={"math": 1},
            concurrencies=(1, 4),
            max_tokens=128,
            temperature=0.0,
            repeats=2,
            seed=0,
            prefix_cache="cold",
        ),
        methods=(
            MethodEntry("ar", "plain", ("python", "-m", "x"), {"LD_PRELOAD": "y"}, 1.5),
            MethodEntry("short", "our engine with a.b=1", ("python",), {}, None, {"a.b": "1", "c.d": "x"}),
        ),
        rows=build_rows(cells, tuple(METHODS.values()), ("math",), "float32", greedy=True),
        failures=(Failure("vllm", "start", "no", ("last", "lines")),),
    )


def test_a_report_survives_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(report(), path)
    assert read_report(path) == report()
    write_report(replace(report(), complete=False, rows=()), path)
    assert read_report(path) == replace(report(), complete=False, rows=())
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_the_public_schema(tmp_path: Path) -> None:
    """These names are promised: a change here breaks other people's readers."""
    write_report(report(), tmp_path / "report.json")
    plain = json.loads((tmp_path / "report.json").read_text())
    assert list(plain)[:2] == ["schema_version", "complete"]
    assert plain["schema_version"] == 1
    assert set(plain) == {
        *("schema_version", "complete", "created", "command", "machine", "settings", "methods", "rows", "failures"),
    }
    assert set(plain["machine"]) >= {
        *("cpu", "features", "cores", "memory_gib", "python", "torch", "vllm", "slipstream", "git_commit"),
    }
    assert set(plain["rows"][0]) >= {
        *("method", "concurrency", "category", "weight_format", "requests", "failed_requests", "output_tokens"),
        *("tokens_per_second", "tokens_per_second_spread", "tokens_per_second_by_repeat"),
        *("time_to_first_token_p50_seconds", "time_to_first_token_p95_seconds"),
        *("time_per_output_token_p50_seconds", "time_per_output_token_p95_seconds"),
        *("emitted_per_verify_step", "identical_to_ar", "identical_fraction", "speed_vs_ar", "speed_vs_vllm"),
    }
    assert {(row["method"], row["category"]) for row in plain["rows"]} == {
        (method, category) for method in METHODS for category in ("math", "all")
    }


def test_keys_of_later_versions_are_ignored_and_other_schemas_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    plain = asdict(report())
    plain["rows"][0]["joules"] = 1
    plain["more"] = {}
    path.write_text(json.dumps(plain))
    assert read_report(path) == report()
    del plain["methods"][0]["settings"], plain["methods"][0]["external"]
    path.write_text(json.dumps(plain))
    assert read_report(path) == report(), "reports from before there were variants and servers"
    path.write_text(json.dumps({**plain, "schema_version": 2}))
    with pytest.raises(BenchError, match="schema version 2, this program reads 1"):
        read_report(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 1}', '{"schema_version": 1, "machine": 3}'])
def test_other_files_are_not_reports(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=r"report\.json"):
        read_report(path)
    with pytest.raises(BenchError, match="cannot read the report"):
        read_report(tmp_path / "none.json")


def test_a_failed_write_keeps_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(report(), path)
    row = replace(report().rows[0], tokens_per_second=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(replace(report(), rows=(row,)), path)
    assert read_report(path) == report()
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(BenchError, match="cannot write the report"):
        write_report(report(), tmp_path / "none" / "report.json")


def test_this_machine_is_described() -> None:
    machine = describe_machine()
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.python.startswith("3.")
    assert machine.memory_gib is None or machine.memory_gib > 0
