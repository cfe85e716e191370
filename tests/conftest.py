"""Engines shared by all tests that need one: starting one takes half a minute, so it is done once."""

from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import Scheduling

from tests.engine_server import EngineServer, SharedServer
from tests.spread import WholeFiles, check_shared_servers, rank

# Small enough that prompts are read in chunks and that eight requests at a time preempt each other.
_CRAMPED = (
    "--model.max_model_len=512",
    "--engine.max_num_batched_tokens=96",
    "--engine.max_num_seqs=8",
    "--engine.kv_cache_gib=0.03",
    "--speculation.min_draft_tokens=1",  # drafts are to be verified at every load
)
_ROOMY = ("--model.max_model_len=512", "--engine.max_num_batched_tokens=96", "--engine.max_num_seqs=8")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Whole files instead of single tests."""
    config.option.loadscopereorder = False  # the order is ours
    return WholeFiles(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without worker processes the order stays that of the files."""
    check_shared_servers(items)
    if hasattr(config, "workerinput"):
        items.sort(key=rank)


@pytest.fixture(scope="session")
def shared_drafting_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    """Our engine with the shipped drafter, in cramped memory."""
    with SharedServer(tmp_path_factory.mktemp("drafting"), _CRAMPED) as shared:
        yield shared


@pytest.fixture(scope="session")
def shared_plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    """Our engine with drafting off: what plain decoding says."""
    with SharedServer(tmp_path_factory.mktemp("plain"), (*_ROOMY, "--no-speculation.enabled")) as shared:
        yield shared


@pytest.fixture
def drafting_server(shared_drafting_server: SharedServer) -> EngineServer:
    """``shared_drafting_server``, running and idle; a test that ends it makes the next one start it again."""
    return shared_drafting_server.running()


@pytest.fixture
def plain_server(shared_plain_server: SharedServer) -> EngineServer:
    """``shared_plain_server``, likewise."""
    return shared_plain_server.running()
