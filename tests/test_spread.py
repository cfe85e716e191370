from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_xdist_make_scheduler
from tests.spread import SHARED_SERVERS, check_shared_servers, rank

EXACTNESS, HTTP, LIFECYCLE = SHARED_SERVERS


def item(file: str, *fixtures: str) -> Any:
    """A collected test."""
    return SimpleNamespace(nodeid=f"{file}::test_it[a::b]", fixturenames=fixtures)


def test_files_of_the_shared_servers_are_one_piece_and_others_one_each(pytestconfig: pytest.Config) -> None:
    options = SimpleNamespace(loadscopereorder=True, tx=["2*popen"])
    config: Any = SimpleNamespace(option=options, getvalue=vars(options).get)
    scheduler: Any = pytest_xdist_make_scheduler(config, None)
    pieces = [scheduler._split_scope(item(file).nodeid) for file in (*SHARED_SERVERS, "tests/a.py", "tests/b.py")]
    assert len(set(pieces)) == 3 and len(set(pieces[:3])) == 1
    assert not options.loadscopereorder
    assert all((pytestconfig.rootpath / file).is_file() for file in SHARED_SERVERS)


def test_servers_come_first_and_those_that_end_them_after_those_that_use_them() -> None:
    quick, engine, compiler = "tests/a/test_a.py", "tests/z/test_engine_z.py", "tests/z/test_cuda_z.py"
    files = [quick, compiler, LIFECYCLE, engine, HTTP, EXACTNESS]
    assert sorted(files, key=lambda file: rank(item(file))) == [EXACTNESS, HTTP, LIFECYCLE, engine, compiler, quick]
    assert rank(item("tests/b/test_b.py")) == rank(item(quick)), "the order of other files stays what it is"


def test_a_file_that_would_start_the_servers_once_more_is_named() -> None:
    check_shared_servers([item(HTTP, "client", "shared_drafting_server"), item("tests/a.py", "tmp_path")])
    with pytest.raises(pytest.UsageError, match="tests/a.py uses a shared server: name it in SHARED_SERVERS"):
        check_shared_servers([item("tests/a.py", "shared_plain_server")])
