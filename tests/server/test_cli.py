import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server import cli
from server.commands import doctor
from server.errors import ModelError

RunCommand = Callable[..., subprocess.CompletedProcess[str]]


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line on standard error of a command that failed on a mistake."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("slipstream: error: ")
    return lines[0].removeprefix("slipstream: error: ")


def test_help_lists_the_commands_and_takes_no_time(slipstream: RunCommand) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = slipstream("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    for command in ("serve", "align", "bench", "bench-kernels", "simulate", "doctor"):
        assert re.search(rf"^    {command}\s", result.stdout, re.MULTILINE)
    # Processor time, since the machine may be busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_every_command_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom server.cli import main\ntry:\n    main([sys.argv[1], '--help'])\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'vllm', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else end.code)"
    )
    root = Path(cli.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, cwd=root)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: slipstream {command}")


def test_help_of_serve_describes_every_setting_with_range_unit_and_default(slipstream: RunCommand) -> None:
    text = " ".join(slipstream("serve", "--help").stdout.split())
    assert (
        "--speculation.max_draft_tokens TOKENS longest draft verified in one step; a whole number from 1 to 32" in text
    )
    assert "--engine.prefix_caching, --no-engine.prefix_caching" in text
    assert "default 8000" in text
    assert "--config PRESET" in text


def test_version(slipstream: RunCommand) -> None:
    result = slipstream("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("slipstream ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a command is needed: serve, align, bench, bench-kernels, simulate, doctor (see slipstream --help)"),
        (["--verbose"], "unknown flag --verbose; nearest known flag: --version, print the version and exit"),
        (["srve"], "argument COMMAND: invalid choice: 'srve'"),
        (["serve", "extra"], "unexpected argument 'extra' (see slipstream serve --help)"),
        (["serve", "--engine.max_num_seq", "3"], "unknown flag --engine.max_num_seq (value '3'); nearest known flag: "),
        (["serve", "--port=80"], "unknown flag --port (value '80'); nearest known flag: --server.port, TCP port"),
        (["serve", "--no-enabled"], "unknown flag --no-enabled; nearest known flag: --no-speculation.enabled"),
        (["serve", "--engine.max-num-seqs", "3"], "nearest known flag: --engine.max_num_seqs"),
        (["serve", "--qqqqqqqqq"], "unknown flag --qqqqqqqqq (see slipstream serve --help)"),
        (["serve", "--server.port"], "argument --server.port: expected one argument (see slipstream serve --help)"),
        (["serve", "--server.port", "99999"], "flag --server.port: server.port = '99999' is not allowed"),
        (["serve", "--config", "nosuch"], "--config nosuch: no such file, and no such preset"),
        (["bench-kernels", "--head", "9"], "unknown flag --head (value '9'); nearest known flag: --heads"),
        (["bench-kernels", "--kv-heads", "2"], "--heads 9 is not a multiple of --kv-heads 2"),
        (["doctor", "--engine.block_size", "x"], "engine.block_size = 'x' is not allowed"),
    ],
)
def test_mistakes_are_answered_with_one_line_and_exit_code_2(
    slipstream: RunCommand, arguments: list[str], message: str
) -> None:
    assert message in complaint(slipstream(*arguments))


def test_mistakes_in_the_environment_are_answered_alike(slipstream: RunCommand) -> None:
    result = slipstream("serve", environment={"SLIPSTREAM_ENGINE__SEEED": "1"})
    assert "environment variable SLIPSTREAM_ENGINE__SEEED: unknown setting 'engine.seeed'" in complaint(result)


def test_flags_are_not_abbreviated(slipstream: RunCommand) -> None:
    assert "unknown flag --server.por" in complaint(slipstream("serve", "--server.por", "80"))


def test_an_error_for_the_user_becomes_a_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModelError("no weights")

    monkeypatch.setattr(doctor, "gather", fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "slipstream: error: no weights\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(doctor, "gather", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor"])


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "gather", interrupt)
    assert cli.main(["doctor"]) == 130
