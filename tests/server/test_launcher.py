import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.hardware import find_openmp, find_tcmalloc
from server.launcher import Machine, environment

ROOT = Path(__file__).parents[2]

OPENMP = Path("/venv/lib/libiomp5.so")
TCMALLOC = Path("/usr/lib/libtcmalloc_minimal.so.4")
FULL = Machine(cpu_backend=True, cores=6, openmp=OPENMP, tcmalloc=TCMALLOC)


def test_libraries_are_preloaded_and_threads_set() -> None:
    result = environment({"HOME": "/home/me"}, FULL)
    assert result == {
        "HOME": "/home/me",
        "LD_PRELOAD": f"{TCMALLOC}:{OPENMP}",
        "OMP_NUM_THREADS": "6",
        "KMP_BLOCKTIME": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def test_it_is_settled_after_one_round() -> None:
    once = environment({"LD_PRELOAD": "/mine.so"}, FULL)
    assert environment(once, FULL) == once


def test_what_the_user_set_is_kept() -> None:
    mine = {
        "OMP_NUM_THREADS": "1",
        "KMP_BLOCKTIME": "200",
        "VLLM_NO_USAGE_STATS": "0",
        "DO_NOT_TRACK": "0",
        "TOKENIZERS_PARALLELISM": "true",
        "LD_PRELOAD": "/opt/libjemalloc.so.2 /opt/libgomp.so.1",
    }
    result = environment(mine, FULL)
    assert result == mine | {"LD_PRELOAD": "/opt/libjemalloc.so.2:/opt/libgomp.so.1"}


def test_a_library_of_the_user_stays_in_front() -> None:
    assert environment({"LD_PRELOAD": "/mine.so"}, FULL)["LD_PRELOAD"] == f"/mine.so:{TCMALLOC}:{OPENMP}"


def test_without_tcmalloc_glibc_is_tuned_for_large_tensors() -> None:
    machine = Machine(cpu_backend=True, cores=2, openmp=OPENMP, tcmalloc=None)
    result = environment({"MALLOC_TOP_PAD_": "7"}, machine)
    assert result["LD_PRELOAD"] == str(OPENMP)
    assert result["MALLOC_MMAP_THRESHOLD_"] == str(32 * 2**20)
    assert "MALLOC_TRIM_THRESHOLD_" in result
    assert result["MALLOC_TOP_PAD_"] == "7"


def test_glibc_is_left_alone_beside_an_allocator_of_the_user() -> None:
    machine = Machine(cpu_backend=True, cores=2, openmp=None, tcmalloc=None)
    assert not any(name.startswith("MALLOC_") for name in environment({"LD_PRELOAD": "/libmimalloc.so"}, machine))


def test_nothing_is_preloaded_for_a_gpu() -> None:
    machine = Machine(cpu_backend=False, cores=2, openmp=OPENMP, tcmalloc=TCMALLOC)
    result = environment({}, machine)
    assert result == {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_libraries_that_cannot_be_named_are_not_found(tmp_path: Path) -> None:
    for folder in (tmp_path / "a b", tmp_path / "good"):
        (folder / "lib").mkdir(parents=True)
        (folder / "lib" / "libiomp5.so").touch()
        (folder / "libtcmalloc.so.4").touch()
    assert find_openmp(tmp_path / "good") == tmp_path / "good" / "lib" / "libiomp5.so"
    assert find_openmp(tmp_path / "a b") is None
    assert find_openmp(tmp_path) is None
    assert find_tcmalloc([tmp_path / "a b", tmp_path / "good"]) == tmp_path / "good" / "libtcmalloc.so.4"


def relaunched(**variables: str) -> list[str]:
    """What a process finds that relaunches itself: its arguments, its marker, its threads, preloaded or not."""
    code = (
        "import os, sys, pathlib\nfrom server.launcher import relaunch\nprint('start', flush=True)\nrelaunch()\n"
        "maps = pathlib.Path('/proc/self/maps').read_text()\n"
        "print(sys.argv[1:], os.environ.get('_SLIPSTREAM_LAUNCHED'), os.environ.get('OMP_NUM_THREADS'))\n"
        "print('libiomp5' in maps)"
    )
    dropped = ("LD_PRELOAD", "OMP_NUM_THREADS", "_SLIPSTREAM_LAUNCHED")
    clean = {name: value for name, value in os.environ.items() if name not in dropped}
    result = subprocess.run(
        [sys.executable, "-c", code, "--flag", "a b"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**clean, **variables},
    )
    assert result.stderr == ""
    return result.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="preloading is for Linux")
def test_the_process_is_executed_once_more_with_its_arguments_and_libraries() -> None:
    lines = relaunched(OMP_NUM_THREADS="3")
    assert lines == ["start", "start", "['--flag', 'a b'] 1 3", str(find_openmp() is not None)]


def test_it_does_not_happen_twice() -> None:
    assert relaunched(_SLIPSTREAM_LAUNCHED="1")[:2] == ["start", "['--flag', 'a b'] 1 None"]
