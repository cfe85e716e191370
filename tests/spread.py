"""How the tests are spread over worker processes (``pytest -n``, as ``make test`` runs it): by whole files.

So the fixtures of a file are made once. The files that use the shared servers count as one, or else every worker would
start the servers. The files that take longest come first, so that no worker is left alone with one of them at the end.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

SHARED_SERVERS = (
    "tests/scheduler/test_engine_exactness.py",
    "tests/server/test_http_engine.py",
    "tests/server/test_serve_lifecycle.py",  # last: it ends them
)
_SERVERS = {"shared_drafting_server", "shared_plain_server"}

# In this order; files with other names are quick. Above all these are those that start an engine or a compiler.
_LONG = ("test_engine_", "test_cuda_", "test_serve_", "test_model_store", "test_doctor", "test_runner")


class WholeFiles(LoadScopeScheduling):
    """Hands out files in the order of the tests that were collected."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return SHARED_SERVERS[0] if file in SHARED_SERVERS else file


def check_shared_servers(items: Iterable[pytest.Item]) -> None:
    """``SHARED_SERVERS`` must be complete.

    Raises:
        pytest.UsageError: a test uses a shared server, and its file is not among them.
    """
    for item in items:
        if _SERVERS & set(getattr(item, "fixturenames", ())) and _file(item) not in SHARED_SERVERS:
            raise pytest.UsageError(f"{_file(item)} uses a shared server: name it in SHARED_SERVERS of {__file__}")


def rank(item: pytest.Item) -> int:
    """Sort key: the tests of shared servers, then other long files, then the rest."""
    file = _file(item)
    if file in SHARED_SERVERS:
        return SHARED_SERVERS.index(file)
    name = Path(file).name
    found = [index for index, start in enumerate(_LONG) if name.startswith(start)]
    return len(SHARED_SERVERS) + (found[0] if found else len(_LONG))


def _file(item: pytest.Item) -> str:
    return item.nodeid.split("::", 1)[0]
