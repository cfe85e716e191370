from pathlib import Path

import pytest

from server.hardware import _cpu_quota, cpu_model_and_flags, memory_gib, usable_cores

MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\n"


def test_this_machine_has_a_core_and_memory() -> None:
    assert usable_cores() >= 1
    total, available = memory_gib() or (0, 0)
    assert 0 < available <= total


@pytest.mark.parametrize(("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None)])
def test_the_quota_of_a_container(tmp_path: Path, text: str, cores: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert _cpu_quota(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("250000", 2.5), ("-1", None)])
def test_the_quota_of_an_older_container(tmp_path: Path, quota: str, cores: float | None) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert _cpu_quota(tmp_path) == cores


def test_memory_is_what_the_container_may_use(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO)
    assert memory_gib(meminfo, tmp_path) == (16.0, 8.0)
    (tmp_path / "memory.max").write_text(f"{4 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    assert memory_gib(meminfo, tmp_path) == (4.0, 3.0)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_gib(meminfo, tmp_path) == (16.0, 8.0)
    assert memory_gib(tmp_path / "none", tmp_path) is None


def test_the_name_and_features_of_the_cpu(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\n")
    assert cpu_model_and_flags(cpuinfo) == ("Some CPU", frozenset({"fpu", "avx2", "fma"}))
    assert cpu_model_and_flags(tmp_path / "none")[1] == frozenset()
