"""Engines shared by all tests that need one: starting one takes seconds, so it is done once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_server import EngineServer

# Small enough that prompts are read in chunks and that eight requests at a time preempt each other.
_CRAMPED = (
    "--model.max_model_len=512",
    "--engine.max_num_batched_tokens=96",
    "--engine.max_num_seqs=8",
    "--engine.kv_cache_gib=0.03",
)
_ROOMY = ("--model.max_model_len=512", "--engine.max_num_batched_tokens=96", "--engine.max_num_seqs=8")


@pytest.fixture(scope="session")
def drafting_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """Our engine with the shipped drafter, in cramped memory. Tests leave it running and idle."""
    yield from _served(tmp_path_factory.mktemp("drafting") / "log", _CRAMPED)


@pytest.fixture(scope="session")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """Our engine with drafting off: what plain decoding says."""
    yield from _served(tmp_path_factory.mktemp("plain") / "log", (*_ROOMY, "--no-speculation.enabled"))


def _served(log: Path, flags: tuple[str, ...]) -> Iterator[EngineServer]:
    server = EngineServer(log, flags)
    try:
        yield server.wait()
    finally:
        server.stop()
