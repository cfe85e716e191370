"""Process sessions: finding, signalling and never leaving behind everything that an engine started.

Every engine leads a session of its own, and its workers stay in it (vLLM does not call ``setsid``), so the session
is the unit that is frozen, resumed and killed. Where there is no ``/proc``, the leader's process group stands for it.

This file also runs as a program of its own (``SessionGuard`` starts it, with nothing but the standard library): it
kills the sessions it was told about when the benchmark that started it disappears, by whatever cause. Without it a
killed benchmark would leave engines that are frozen for ever, holding their memory.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, NamedTuple

__all__ = ["Member", "SessionGuard", "freeze_session", "kill_session", "resume_session", "session_members"]

_PROC = Path("/proc")
_DEAD_STATES = "ZX"
_STOPPED_STATES = "Tt"


class Member(NamedTuple):
    """One living process of a session; ``state`` is the letter that ``/proc/PID/stat`` gives."""

    pid: int
    group: int
    state: str


def session_members(session: int) -> tuple[Member, ...]:
    """The processes of a session, without those that only wait to be reaped."""
    members = []
    for entry in _PROC.glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text(errors="replace")
        except OSError:
            continue  # it ended while we looked
        # The command name is in parentheses and may hold spaces and parentheses itself.
        state, _parent, group, of_session = stat.rpartition(")")[2].split()[:4]
        if int(of_session) == session and state not in _DEAD_STATES:
            members.append(Member(int(entry.name), int(group), state))
    return tuple(members)


def signal_session(session: int, signum: signal.Signals) -> None:
    """Send a signal to every process of a session; those that are gone already do not matter."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signum)  # one call reaches the whole group, even processes that are just being forked
    for member in session_members(session):
        if member.group != session:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member.pid, signum)


def freeze_session(session: int, timeout: float = 5.0) -> bool:
    """Stop every process of a session and wait until all of them are stopped.

    Args:
        session: the session's id.
        timeout: seconds to wait; a process that waits for a disk stops only afterwards.

    Returns:
        Whether all of them are stopped (or gone).
    """
    deadline = time.monotonic() + timeout
    while True:
        signal_session(session, signal.SIGSTOP)
        if all(member.state in _STOPPED_STATES for member in session_members(session)):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)


def resume_session(session: int) -> None:
    """Let every process of a session run again."""
    signal_session(session, signal.SIGCONT)


def kill_session(session: int, timeout: float = 5.0) -> None:
    """End every process of a session, and wait until none is left (for ``timeout`` seconds at most)."""
    deadline = time.monotonic() + timeout
    signal_session(session, signal.SIGKILL)
    while session_members(session) and time.monotonic() < deadline:
        time.sleep(0.002)
        signal_session(session, signal.SIGKILL)  # again: one may have been forked while we looked


class SessionGuard:
    """Kills the sessions it protects against when this process dies without having stopped them.

    Use as a context manager. ``add`` and ``drop`` tell the guard's process, which leads a session of its own so that
    Ctrl-C in a terminal does not reach it, and which sees the end of this process as the end of its input.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "SessionGuard":
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process:
            with contextlib.suppress(BrokenPipeError):
                process.communicate()

    def add(self, session: int) -> None:
        """From now on kill this session if this process disappears."""
        self._tell(f"add {session}")

    def drop(self, session: int) -> None:
        """The session has ended; its number may soon be somebody else's."""
        self._tell(f"drop {session}")

    def _tell(self, line: str) -> None:
        if self._process and self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()


def _guard(orders: IO[str]) -> None:
    """The guard's own program: follow orders until they end, then kill what is left."""
    sessions: set[int] = set()
    for line in orders:
        word, number = line.split()
        (sessions.add if word == "add" else sessions.discard)(int(number))
    for session in sessions:
        kill_session(session)


if __name__ == "__main__":
    _guard(sys.stdin)
