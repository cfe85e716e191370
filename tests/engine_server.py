"""A real ``slipstream serve`` as a child process, for tests that need the real engine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from bench.process import free_port

MODEL = "smollm2-135m-instruct"
_START_SECONDS = 240


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of ``/v1/completions``: tokens and text."""

    token_ids: tuple[int, ...]
    text: str


class EngineServer:
    """Started on construction, ready after ``wait``; ``stop`` ends it and everything it started.

    Args:
        log: file that gets what the server prints.
        flags: settings flags of ``slipstream serve``.
    """

    def __init__(self, log: Path, flags: Sequence[str]):
        self.port = free_port()
        self.log = log
        # Every SLIPSTREAM_ variable is a setting, but those of whoever runs the tests are not the server's.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        command = [sys.executable, "-m", "server.cli", "serve", "--server.port", str(self.port), *flags]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=300)

    def wait(self) -> "EngineServer":
        """Block until requests are answered."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                if self.client.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise TimeoutError(f"the server was not ready after {_START_SECONDS} s:\n{self.log.read_text()}")

    def stop(self) -> int:
        """SIGTERM, then SIGKILL for the whole session should that not be enough; returns the exit code."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)
        return self.process.returncode

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """POST JSON; the model's name is filled in."""
        return self.client.post(path, json={"model": MODEL, **body})

    def complete(self, prompt: str, **options: Any) -> Completion:
        """One completion, greedy unless the options say otherwise."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 32, "return_token_ids": True}
        response = self.post("/v1/completions", {**body, **options})
        response.raise_for_status()
        choice = response.json()["choices"][0]
        return Completion(tuple(choice["token_ids"]), choice["text"])

    def complete_all(self, prompts: Sequence[str], concurrency: int, **options: Any) -> list[Completion]:
        """Complete every prompt, ``concurrency`` at a time, in the order of ``prompts``."""
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, **options), prompts))

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        values = [line.rsplit(" ", 1)[1] for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(map(float, values))

    def speculation(self) -> dict[str, Any]:
        """``GET /v1/speculation``."""
        report: dict[str, Any] = json.loads(self.client.get("/v1/speculation").text)
        return report


class SharedServer:
    """One server for many tests: started when the first asks for it, and once more after a test has ended it.

    Args:
        folder: gets the logs.
        flags: see ``EngineServer``.
    """

    def __init__(self, folder: Path, flags: Sequence[str]):
        self._folder = folder
        self._flags = flags
        self._server: EngineServer | None = None
        self._starts = 0
        self._broken = False

    def running(self) -> EngineServer:
        """The server, ready for requests.

        Raises:
            RuntimeError: it did not start, now or before: that is tried once.
        """
        if self._broken:
            raise RuntimeError(f"the server did not start for an earlier test, see {self._folder}")
        if self._server is None or self._server.process.poll() is not None:
            self._stop()
            self._starts += 1
            self._broken = True
            self._server = EngineServer(self._folder / f"log-{self._starts}", self._flags)
            self._server.wait()
            self._broken = False
        return self._server

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    def __enter__(self) -> "SharedServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
