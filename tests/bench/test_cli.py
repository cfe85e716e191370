import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.cli import run
from bench.report import Report, read_report
from tests.bench import fakes
from tests.bench.fakes import engine_pids, is_running, parse, wait_until, write_model, write_prompts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--methods", "vllm,fast"], 'unknown method "fast"; known methods: vllm, ar, slipstream'),
        (["--concurrency", "1,x"], '--concurrency 1,x: "x" is not a whole number above 0'),
        (["--concurrency", "0"], '--concurrency 0: "0" is not a whole number above 0'),
        (["--concurrency", "2,2"], "--concurrency 2,2: a number is given twice"),
        (
            ["--concurrency", "1,99"],
            "--concurrency 99: of category math there are only 2 prompts, so no more requests than that would be in "
            "flight; give more prompts, or mix the categories with --mixed",
        ),
        (["--prompts", "none.jsonl"], "cannot read the prompt file none.jsonl: No such file or directory"),
        (["--output", "nowhere/report.json"], "the folder {cwd}/nowhere does not exist"),
        (["--output", "."], "the output . is a folder; name a file in it"),
        (["--logs", "nowhere"], "the folder {cwd}/nowhere does not exist"),
        (["--max-tokens", "0"], "--max-tokens 0 is not above 0"),
        (["--kv-cache-gib", "nan"], "--kv-cache-gib nan is not above 0"),
        (["--shortest", "200"], "--shortest 200 is not from 1 to --max-tokens 128"),
        (["--limit", "-1"], "--limit -1 is not above 0"),
        (["--temperature", "3"], "--temperature 3 is not between 0 and 2"),
        (["--seed", "-1"], "--seed -1 is negative"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path)
    arguments = ["--prompts", str(write_prompts(tmp_path)), "--model", str(model), *changes]
    assert run(parse(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err == f"slipstream: error: {message.format(cwd=tmp_path)}\n"
    assert not captured.out


def test_a_missing_model_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompts", str(write_prompts(tmp_path)), "--model", str(tmp_path / "none")]
    assert run(parse([*arguments, "--output", str(tmp_path / "report.json")])) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"slipstream: error: model folder {tmp_path / 'none'} does not exist")
    assert error.count("\n") == 1


@contextmanager
def running(folder: Path, methods: str) -> Iterator[subprocess.Popen[str]]:
    """A benchmark in a process of its own, which would run for a long time."""
    arguments = ["--prompts", str(write_prompts(folder)), "--model", str(write_model(folder)), "--methods", methods]
    command = [*arguments, "--output", str(folder / "report.json"), "--max-tokens", "9", "--repeats", "1000"]
    with subprocess.Popen(
        [sys.executable, fakes.__file__, str(folder), *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def written(folder: Path) -> Report | None:
    """The report, as soon as there is one."""
    return read_report(folder / "report.json") if (folder / "report.json").exists() else None


def test_ctrl_c_leaves_a_valid_partial_report_and_no_processes(tmp_path: Path) -> None:
    with running(tmp_path, "ar,slipstream") as process:
        wait_until(lambda: bool((report := written(tmp_path)) and len(report.rows) > 4))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=15)
    assert process.returncode == 130, err
    report = read_report(tmp_path / "report.json")
    assert not report.complete
    assert {row.method for row in report.rows} == {"ar", "slipstream"}
    assert err.splitlines()[-1] == f"partial report written to {tmp_path / 'report.json'}"
    assert "Traceback" not in err
    assert out.startswith("method")
    assert len(engine_pids(tmp_path)) == 4
    assert not any(map(is_running, engine_pids(tmp_path)))


def test_sigterm_while_an_engine_starts(tmp_path: Path) -> None:
    with running(tmp_path, "ar,silent") as process:
        wait_until((tmp_path / "silent.pid").exists)
        process.terminate()
        out, err = process.communicate(timeout=15)
    assert process.returncode == 143, err
    report = read_report(tmp_path / "report.json")
    assert (report.complete, report.rows) == (False, ())
    assert [entry.name for entry in report.methods] == ["ar", "silent"]
    assert not out
    assert "Traceback" not in err
    assert not any(map(is_running, engine_pids(tmp_path)))


def test_even_a_killed_benchmark_leaves_no_processes(tmp_path: Path) -> None:
    with running(tmp_path, "ar,slipstream") as process:
        wait_until(lambda: written(tmp_path) is not None)
        process.kill()
    wait_until(lambda: not any(map(is_running, engine_pids(tmp_path))))
    assert not read_report(tmp_path / "report.json").complete
