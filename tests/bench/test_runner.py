import json
from bisect import bisect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.cli import run
from bench.report import Report, Row, read_report
from bench.terminal import render_table
from tests.bench.fakes import (
    PROMPTS,
    engine_pids,
    fake_method,
    fake_methods,
    is_running,
    parse,
    write_model,
    write_prompts,
)


@dataclass(frozen=True)
class Ran:
    """A finished benchmark."""

    code: int
    report: Report
    folder: Path

    def row(self, method: str, concurrency: int, category: str) -> Row:
        key = (method, concurrency, category)
        return next(row for row in self.report.rows if (row.method, row.concurrency, row.category) == key)


def bench(folder: Path, methods: Any, *arguments: str) -> Ran:
    output = folder / "report.json"
    common = ["--prompts", str(write_prompts(folder)), "--model", str(write_model(folder)), "--output", str(output)]
    code = run(parse([*common, "--max-tokens", "9", "--repeats", "2", *arguments]), methods)
    assert not any(is_running(pid) for pid in engine_pids(folder))
    return Ran(code, read_report(output), folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("bench")
    methods = fake_methods(folder)
    return bench(folder, methods, "--methods", "vllm,broken,ar,slipstream", "--concurrency", "1,2")


def test_every_method_concurrency_and_category_has_a_row(ran: Ran) -> None:
    assert [(row.method, row.concurrency, row.category) for row in ran.report.rows] == [
        (method, concurrency, category)
        for method in ("vllm", "ar", "slipstream")
        for concurrency in (1, 2)
        for category in (*PROMPTS, "all")
    ]
    for row in ran.report.rows:
        assert row.repeats == 2
        assert row.requests == 2 * sum(len(some) for name, some in PROMPTS.items() if row.category in (name, "all"))
        assert row.output_tokens == 9 * row.requests
        assert row.prompt_tokens == 7 * row.requests
        assert row.failed_requests == 0
        assert row.tokens_per_second > 0
    assert ran.report.complete


def test_the_settings_and_the_methods_are_on_record(ran: Ran) -> None:
    settings = ran.report.settings
    assert settings.prompts_per_category == {"math": 2, "chat": 3}
    assert (settings.concurrencies, settings.max_tokens, settings.repeats) == ((1, 2), 9, 2)
    entries = {entry.name: entry for entry in ran.report.methods}
    assert list(entries) == ["vllm", "broken", "ar", "slipstream"]
    assert entries["ar"].command[0] == "python"
    assert (entries["ar"].startup_seconds or 0) > 0
    assert entries["broken"].startup_seconds is None


def test_speed_and_latency_follow_the_engines(ran: Ran) -> None:
    fast, slow = ran.row("slipstream", 1, "all"), ran.row("vllm", 1, "all")
    assert fast.speed_vs_vllm is not None and fast.speed_vs_vllm > 1.5
    assert fast.speed_vs_ar is not None and fast.speed_vs_ar > 1
    assert ran.row("vllm", 1, "all").speed_vs_vllm == 1.0
    assert slow.time_per_output_token_p50_seconds is not None and slow.time_per_output_token_p50_seconds >= 0.006
    assert slow.time_to_first_token_p50_seconds is not None and slow.time_to_first_token_p50_seconds >= 0.006
    assert ran.row("vllm", 2, "all").tokens_per_second > slow.tokens_per_second


def test_counters_are_those_of_the_measured_loads_alone(ran: Ran) -> None:
    row = ran.row("slipstream", 1, "math")
    assert row.emitted_per_verify_step == 3.0
    assert (row.drafted_tokens, row.verified_tokens, row.accepted_tokens) == (48, 36, 24)  # 4 requests of 3 steps
    assert ran.row("vllm", 1, "math").emitted_per_verify_step == 1.0


def test_different_texts_are_found(ran: Ran) -> None:
    assert ran.row("slipstream", 2, "chat").identical_to_ar is True
    assert ran.row("slipstream", 2, "math").identical_to_ar is False
    assert ran.row("slipstream", 2, "math").identical_fraction == 0.5
    assert ran.row("slipstream", 2, "all").identical_fraction == 0.8
    assert ran.row("slipstream", 2, "all").repeatable_fraction == 1.0
    assert ran.row("vllm", 1, "all").identical_to_ar is True


def test_a_method_that_does_not_start_is_reported_and_the_others_go_on(ran: Ran) -> None:
    assert ran.code == 1
    (failure,) = ran.report.failures
    assert (failure.method, failure.stage) == ("broken", "start")
    assert failure.message == "the engine ended with exit code 7"
    assert failure.log_tail == ("first line", "no such model")


def test_nothing_is_left_behind_but_the_report(ran: Ran) -> None:
    assert len(engine_pids(ran.folder)) == 6
    assert not [
        path
        for path in ran.folder.iterdir()
        if path.suffix not in {".json", ".jsonl", ".pid", ".ticks", ".answered", ""}
    ]
    assert len(render_table(ran.report.rows).splitlines()) == 1 + len(ran.report.rows)


def test_nobody_else_runs_while_an_engine_answers(ran: Ran) -> None:
    ticks = {path.stem: [float(line) for line in path.read_text().split()] for path in ran.folder.glob("*.ticks")}
    assert set(ticks) == {"vllm", "ar", "slipstream"}
    for name, own in ticks.items():
        answered = [
            tuple(map(float, line.split())) for line in (ran.folder / f"{name}.answered").read_text().splitlines()
        ]
        assert len(answered) > 2 * 2 * 5
        others = sorted(tick for other, times in ticks.items() if other != name for tick in times)
        for began, ended in answered:
            assert bisect(others, began) == bisect(others, ended)
        assert any(began < tick < ended for began, ended in answered for tick in own)


def test_an_engine_that_dies_is_given_up_and_single_failures_are_counted(tmp_path: Path) -> None:
    methods = {
        "ar": fake_method(tmp_path, "ar", refuses="two"),
        "dies": fake_method(tmp_path, "dies", ends_after=8),
    }
    ran = bench(tmp_path, methods, "--methods", "ar,dies", "--concurrency", "1", "--logs", str(tmp_path))
    assert ran.code == 1
    assert ran.report.complete
    failures = {(failure.method, failure.stage): failure for failure in ran.report.failures}
    assert set(failures) == {("ar", "request"), ("dies", "measure")}
    assert failures["dies", "measure"].message == "the engine ended with exit code 3"
    assert failures["dies", "measure"].log_tail == ("the fake engine gives up",)
    assert failures["ar", "request"].message.endswith("the first: HTTP 400: will not answer: two")
    assert ran.row("ar", 1, "math").failed_requests == 2
    assert ran.row("ar", 1, "all").requests == 8
    assert (tmp_path / "dies.log").read_text() == "the fake engine gives up\n"


def test_the_same_is_asked_of_all_methods_and_prompts_are_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[Any]] = {}
    from bench import client

    def spy(target: client.Target, load: client.Load, index: int) -> dict[str, Any]:
        body = build(target, load, index)
        asked.setdefault(target.base_url, []).append(body)
        return body

    build = client._request_body
    monkeypatch.setattr(client, "_request_body", spy)
    methods = {name: fake_method(tmp_path, name) for name in ("ar", "new")}
    chosen = ("--methods", "ar,new", "--concurrency", "1", "--limit", "1", "--temperature", "0.5", "--seed", "3")
    ran = bench(tmp_path, methods, *chosen)
    assert ran.code == 0
    ours, theirs = (sorted(json.dumps(body, sort_keys=True) for body in bodies) for bodies in asked.values())
    assert ours == theirs
    measured = [body for body in map(json.loads, ours) if body["cache_salt"].startswith("repeat")]
    assert {body["cache_salt"] for body in measured} == {"repeat 0 at 1", "repeat 1 at 1"}
    assert {(body["seed"], body["temperature"], body["max_tokens"]) for body in measured} == {(3, 0.5, 9)}
    assert {body["cache_prompt"] for body in measured} == {False}
    assert ran.row("new", 1, "all").identical_to_ar is None
