"""One engine as a child process: started in a session of its own, frozen, resumed and stopped as a whole."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.methods import LOOPBACK, Launch
from bench.sessions import freeze_session, kill_session, resume_session, session_members

__all__ = ["EngineProcess", "free_port", "stop_processes"]

_LOG_TAIL_BYTES = 16_384
_ORPHAN_GRACE_SECONDS = 0.5


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


class EngineProcess:
    """A running engine; ``session`` is its process id, its session and its process group at once."""

    def __init__(self, launch: Launch, log: Path) -> None:
        """Start the engine.

        Args:
            launch: command and added environment.
            log: file that takes everything it prints.

        Raises:
            OSError: the command cannot be started.
        """
        self.log = log
        self.frozen = False
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                launch.command,
                env={**os.environ, **launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.session = self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The leader's exit code (negative: the signal that ended it), ``None`` while it runs."""
        return self._process.poll()

    @property
    def gone(self) -> bool:
        """Neither the leader nor any process of its session is left."""
        return self.exit_code is not None and not session_members(self.session)

    def freeze(self) -> bool:
        """Stop all of its processes, so that an engine that polls while idle takes no core from the others.

        Returns:
            Whether all of them stand still.
        """
        self.frozen = True
        return freeze_session(self.session)

    def resume(self) -> None:
        """Let it run again."""
        resume_session(self.session)
        self.frozen = False

    def ask_to_stop(self) -> None:
        """Ask the leader to shut down in order, as an operator would."""
        self.resume()
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End whatever is left of it, at once."""
        kill_session(self.session)
        self._process.wait()

    def log_tail(self, lines: int = 30) -> tuple[str, ...]:
        """The last lines that it printed, oldest first."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
                text = log.read().decode("utf-8", errors="replace")
        except OSError:
            return ()
        return tuple(deque(text.splitlines(), maxlen=lines))


def stop_processes(
    processes: Iterable[EngineProcess], grace: float = 15.0, hurry: Callable[[], bool] = lambda: False
) -> None:
    """Stop engines, all at the same time, and return when nothing of them is left.

    Args:
        processes: the engines; frozen ones and those that ended by themselves may be among them.
        grace: seconds that they get to shut down in order before they are killed.
        hurry: asked again and again; when true the rest of the grace is not waited for.
    """
    left = list(processes)
    for process in left:
        process.ask_to_stop()
    deadline = time.monotonic() + grace
    leaders_gone = False
    while left and time.monotonic() < deadline and not hurry():
        time.sleep(0.02)
        left = [process for process in left if not process.gone]
        if not leaders_gone and all(process.exit_code is not None for process in left):
            # What outlives its leader was not told to stop by it and will hardly do so by itself.
            leaders_gone, deadline = True, min(deadline, time.monotonic() + _ORPHAN_GRACE_SECONDS)
    for process in left:
        process.kill()
