"""Starting and ending the real server; it is ended here, so it is not the shared one."""

import os
import signal
import time
from pathlib import Path

from bench.sessions import Member, session_members
from tests.engine_server import EngineServer

_FLAGS = ("--model.max_model_len=512", "--engine.kv_cache_gib=0.1", "--engine.max_num_seqs=4")


def _members_left(session: int, seconds: float) -> tuple[Member, ...]:
    """Processes of the session that are still there after at most ``seconds``."""
    deadline = time.monotonic() + seconds
    while (left := session_members(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_start_block_then_sigterm_leaves_no_process(tmp_path: Path) -> None:
    server = EngineServer(tmp_path / "log", _FLAGS)
    try:
        server.wait()
        assert server.complete("Hello", max_tokens=4).text
        printed = server.log.read_text()
        for text in (f"http://127.0.0.1:{server.port}/v1", "smollm2-135m-instruct", "drafter", "curl "):
            assert text in printed
        assert "Traceback" not in printed
        assert len(session_members(server.process.pid)) >= 2
    finally:
        code = server.stop()
    assert code == 0
    assert _members_left(server.process.pid, 10) == ()


def test_sigkill_of_the_front_end_leaves_no_process(tmp_path: Path) -> None:
    server = EngineServer(tmp_path / "log", _FLAGS)
    try:
        server.wait()
        assert len(session_members(server.process.pid)) >= 2
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        assert _members_left(server.process.pid, 10) == ()
    finally:
        server.stop()
