"""The README's table comes from a report and from nowhere else."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.readme import benchmark_section, main, update_readme
from bench.report import write_report
from tests.bench.test_report import report


def test_section_has_a_line_for_every_method_and_names_machine_and_command() -> None:
    section = benchmark_section(report(), "docs/report.json")
    lines = [line for line in section.splitlines() if line.startswith("| 1 | ")]
    assert [line.split(" | ")[2] for line in lines if " | all | " in line] == ["vllm", "ar", "slipstream"]
    assert "a CPU, 2 cores" in section and "`slipstream bench`" in section
    assert "[docs/report.json](docs/report.json)" in section
    assert "`ar` our engine with drafting off. `short` is our engine with a.b=1.\n" in section


def test_a_name_cannot_break_the_table() -> None:
    row = replace(report().rows[0], method="a|b", category="all")
    assert "| a\\|b |" in benchmark_section(replace(report(), rows=(row,)), "report.json")


def test_only_what_is_between_the_markers_changes() -> None:
    readme = "before\n<!-- benchmark:begin -->\nold\n<!-- benchmark:end -->\nafter\n"
    assert update_readme(readme, "new") == "before\n<!-- benchmark:begin -->\nnew\n<!-- benchmark:end -->\nafter\n"
    with pytest.raises(BenchError, match="benchmark:begin"):
        update_readme("no markers", "new")


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
