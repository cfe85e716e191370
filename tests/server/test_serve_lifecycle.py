"""Starting and ending the real server: the shared ones, after all that other tests have asked of them."""

import os
import signal
import time

from bench.sessions import Member, session_members
from tests.engine_server import EngineServer


def _members_left(session: int, seconds: float) -> tuple[Member, ...]:
    """Processes of the session that are still there after at most ``seconds``."""
    deadline = time.monotonic() + seconds
    while (left := session_members(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_start_block_then_sigterm_leaves_no_process(drafting_server: EngineServer) -> None:
    assert drafting_server.complete("Hello", max_tokens=4).text
    printed = drafting_server.log.read_text()
    for text in (f"http://127.0.0.1:{drafting_server.port}/v1", "smollm2-135m-instruct", "drafter", "curl "):
        assert text in printed
    assert "Traceback" not in printed
    session = drafting_server.process.pid
    assert len(session_members(session)) >= 2
    assert drafting_server.stop() == 0
    assert _members_left(session, 10) == ()


def test_sigkill_of_the_front_end_leaves_no_process(plain_server: EngineServer) -> None:
    session = plain_server.process.pid
    assert len(session_members(session)) >= 2
    os.kill(session, signal.SIGKILL)
    plain_server.process.wait(10)
    assert _members_left(session, 10) == ()
