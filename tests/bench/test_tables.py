"""The README's table comes from a report and from nowhere else."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.report import MethodEntry, write_report
from bench.tables import benchmark_section, main, update_document
from tests.bench.test_report import report


def test_section_has_a_line_for_every_method_and_names_machine_and_command() -> None:
    section = benchmark_section(report(), "docs/report.json")
    lines = [line for line in section.splitlines() if line.startswith("| 1 | ")]
    assert [line.split(" | ")[2] for line in lines if " | all | " in line] == ["vllm", "ar", "slipstream"]
    assert "a CPU, 2 cores" in section and "`slipstream bench`" in section
    assert "[docs/report.json](docs/report.json)" in section
    assert "`ar` our engine with drafting off. `short` is our engine with a.b=1.\n" in section


@pytest.mark.parametrize("flag", [("--server", "{}"), ("--server={}",)])
def test_other_servers_are_named_with_their_command_line_or_address(flag: tuple[str, ...]) -> None:
    started = "llama-server -m org/model.gguf --port {port}"
    entries = (
        MethodEntry("started", "a server", ("llama-server",), {}, 1.0, external=started),
        MethodEntry("running", "a server", (), {}, None, external="http://127.0.0.1:8081"),
    )
    words = (word.format(text) for text in (f"started={started}", "running=http://127.0.0.1:8081") for word in flag)
    command = ("slipstream", "bench", "--output", "/some/where/report.json", *words)
    row = replace(report().rows[0], method="running", category="all", weight_format=None, emitted_per_verify_step=None)
    section = benchmark_section(replace(report(), methods=entries, rows=(row,), command=command), "report.json")
    assert (
        f" `started` is another server, with weights and arithmetic of its own: `{started}`. `running` is another "
        "server, with weights and arithmetic of its own: `http://127.0.0.1:8081`.\n"
    ) in section
    shown = shlex.join(("slipstream", "bench", "--output", "report.json", *command[4:]))
    assert f"Made by `{shown}`;" in section
    assert "| 1 | all | running | 10.0 | 1.00 | 1.00 |  | 100% |" in section


def test_a_name_cannot_break_the_table() -> None:
    row = replace(report().rows[0], method="a|b", category="all")
    assert "| a\\|b |" in benchmark_section(replace(report(), rows=(row,)), "report.json")


def test_only_what_is_between_the_markers_changes() -> None:
    text = "before\n<!-- benchmark:begin -->\nold\n<!-- benchmark:end -->\nafter\n"
    changed = update_document(text, report(), "a.json", "docs/a.json")
    section = benchmark_section(report(), "docs/a.json")
    assert changed == f"before\n<!-- benchmark:begin -->\n{section}\n<!-- benchmark:end -->\nafter\n"
    with pytest.raises(BenchError, match="benchmark:begin"):
        update_document("no markers", report(), "a.json", "a.json")


def test_a_document_can_ask_for_the_speeds_of_a_report() -> None:
    text = "".join(f"<!-- speeds:begin {name}.json -->\nold\n<!-- speeds:end -->\n" for name in "ab")
    changed = update_document(text, report(), "b.json", "b.json")
    before, _, section = changed.partition("<!-- speeds:begin b.json -->\n")
    assert before == "<!-- speeds:begin a.json -->\nold\n<!-- speeds:end -->\n"
    assert section.startswith("| temperature 0, requests at once | 1 | 4 |\n|---|---|---|\n")
    assert "\n| ar | 10.0 (1.00) |  |\n" in section, "what was not measured stays empty"
    assert section.endswith(
        "Medians of 2 alternating repeats on a CPU, 2 cores; [b.json](b.json), made by `slipstream bench`.\n"
        "<!-- speeds:end -->\n"
    )


def test_the_command_rewrites_in_place_and_is_repeatable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, source = tmp_path / "README.md", tmp_path / "report.json"
    readme.write_text("<!-- benchmark:begin -->\n<!-- benchmark:end -->\n")
    write_report(report(), source)
    assert main([str(source), str(readme)]) == 0
    once = readme.read_text()
    assert main([str(source), str(readme)]) == 0
    assert readme.read_text() == once and "[report.json](report.json)" in once
    assert main([str(tmp_path / "none.json"), str(readme)]) == 2
    assert "error" in capsys.readouterr().err
