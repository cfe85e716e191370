"""The engines of one report: started once, ready before anything is measured, and only one of them awake at a time.

An idle engine is not free: vLLM's processes poll for work, and on a small machine that takes a core from whoever is
being measured. So every engine but one is frozen with SIGSTOP, as a whole, and resumed before its turn. A server that
ran before is the exception: it is not ours to freeze or to stop, and has to be quiet by itself.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench import loopback
from bench.client import Target
from bench.errors import EngineError, Stage
from bench.interrupts import Interrupts
from bench.methods import LOOPBACK, Launch, Method
from bench.process import EngineProcess, stop_processes
from bench.sessions import SessionGuard

__all__ = ["Engine", "EnginePool"]

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that answers requests (while it is not frozen).

    Attributes:
        method: what it runs.
        process: its processes; ``None`` for a server that ran before.
        target: where it answers.
        startup_seconds: from its start to its being ready; ``None`` for a server that ran before.
    """

    method: Method
    process: EngineProcess | None
    target: Target
    startup_seconds: float | None

    def failure_if_dead(self, stage: Stage, patience: float = 1.0) -> EngineError | None:
        """What to report when the engine has ended by itself; whether a server that ran before has is not known.

        Args:
            stage: what it was doing.
            patience: seconds to wait for its end; connections break before the process is gone.
        """
        if self.process is None:
            return None
        deadline = time.monotonic() + patience
        while (code := self.process.exit_code) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if code is None:
            return None
        return EngineError(stage, f"the engine ended with {_exit(code)}", self.log_tail())

    def log_tail(self) -> tuple[str, ...]:
        """The last lines that it printed, oldest first, as far as they are known."""
        return self.process.log_tail() if self.process else ()


class EnginePool:
    """Context manager for the engines of a report; leaving it stops them all, however it is left."""

    def __init__(
        self, interrupts: Interrupts, logs: Path, status: Callable[[str], None], startup_timeout: float
    ) -> None:
        """Create an empty pool.

        Args:
            interrupts: held back while processes are started and stopped.
            logs: folder for one log file a method.
            status: told every now and then what is being waited for.
            startup_timeout: seconds that an engine gets to become ready.
        """
        self._interrupts = interrupts
        self._logs = logs
        self._status = status
        self._startup_timeout = startup_timeout
        self._guard = SessionGuard()
        self._processes: list[EngineProcess] = []
        self._log_names: set[str] = set()

    def __enter__(self) -> "EnginePool":
        self._guard.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        with self._interrupts.deferred():
            # Whoever is impatient enough to interrupt once more does not wait for orderly ends.
            self._stop(self._processes, hurry=lambda: self._interrupts.pending)
            self._guard.__exit__()

    def start(self, method: Method, launch: Launch, port: int) -> Engine:
        """Start an engine with all others frozen, or find one that runs already, and wait until it is ready.

        Raises:
            EngineError: it ended, is not there or did not become ready in time; nothing of what was started is left
                then.
        """
        self._freeze_others(None)
        began = time.monotonic()
        if launch.address is not None:
            return Engine(method, None, self._wait_until_ready(method, None, launch.address), None)
        process = self._run(method, launch)
        try:
            target = self._wait_until_ready(method, process, f"http://{LOOPBACK}:{port}")
        except EngineError:
            self.retire(process)
            raise
        return Engine(method, process, target, time.monotonic() - began)

    def _run(self, method: Method, launch: Launch) -> EngineProcess:
        try:
            with self._interrupts.deferred():
                process = EngineProcess(launch, self._log_file(method.name))
                self._processes.append(process)
                self._guard.add(process.session)
        except OSError as error:
            raise EngineError("start", f"cannot run {launch.command[0]}: {error.strerror}") from error
        return process

    def focus(self, engine: Engine) -> None:
        """Freeze all engines but this one, which is resumed."""
        self._freeze_others(engine.process)
        if engine.process and engine.process.frozen:
            engine.process.resume()

    def retire(self, process: EngineProcess | None) -> None:
        """Stop an engine for good; a server that ran before (``None``) goes on."""
        if process is None:
            return
        with self._interrupts.deferred():
            self._stop([process], hurry=lambda: self._interrupts.pending)

    def _log_file(self, method: str) -> Path:
        """A file of its own for each engine, also where names differ only in what file names cannot hold."""
        plain = name = _file_name(method)
        number = 1
        while name in self._log_names:
            number += 1
            name = f"{plain}-{number}"
        self._log_names.add(name)
        return self._logs / f"{name}.log"

    def _freeze_others(self, focused: EngineProcess | None) -> None:
        for process in self._processes:
            if process is not focused and not process.frozen and not process.freeze():
                self._status(f"process {process.session} cannot be stopped and may disturb the measurement")

    def _stop(self, processes: list[EngineProcess], hurry: Callable[[], bool]) -> None:
        stop_processes(processes, hurry=hurry)
        for process in tuple(processes):
            self._guard.drop(process.session)
            self._processes.remove(process)

    def _wait_until_ready(self, method: Method, process: EngineProcess | None, base_url: str) -> Target:
        """Where the engine answers. A server that ran before is only waited for while it says that it is loading."""
        began = time.monotonic()
        with loopback.client(base_url, timeout=5.0) as client:
            while (waited := time.monotonic() - began) < self._startup_timeout:
                if process and (code := process.exit_code) is not None:
                    raise EngineError("start", f"the engine ended with {_exit(code)}", process.log_tail())
                try:
                    return Target(base_url, _served_model(client))
                except _NotReadyError as reason:
                    if process is None and not reason.loading:
                        raise EngineError("start", f"no server to be measured at {base_url}: {reason}") from reason
                self._status(f"{method.name}: starting, {waited:.0f} s")
                time.sleep(_POLL_SECONDS)
        message = f"the engine was not ready after {self._startup_timeout:g} s"
        raise EngineError("start", message, process.log_tail() if process else ())


class _NotReadyError(Exception):
    """Why a server cannot be asked yet; ``loading`` if it says itself that it will be ready."""

    def __init__(self, reason: str, *, loading: bool = False) -> None:
        super().__init__(reason)
        self.loading = loading


def _served_model(client: httpx.Client) -> str:
    """The first model that the server offers, once it is healthy (or has no health route at all).

    Raises:
        _NotReadyError: it does not answer, or not so.
    """
    try:
        health = client.get("/health")
        if health.is_server_error:
            raise _NotReadyError(f"/health answers with HTTP {health.status_code}", loading=True)
        response = client.get("/v1/models")
        if not response.is_success:
            raise _NotReadyError(f"/v1/models answers with HTTP {response.status_code}")
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPError as error:
        raise _NotReadyError(f"{type(error).__name__}: {error}".rstrip(": ")) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _NotReadyError("/v1/models does not answer with a list of models") from error


def _exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _file_name(method: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in method)
