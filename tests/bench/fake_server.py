"""A small OpenAI-compatible server with a predictable mind, run as a child process by the tests.

It reads a ``FakeBehaviour`` as JSON from its command line. Its answer to a prompt is a fixed sequence of words, so
that texts, token counts and speculation counters can be compared exactly. It is bare ASGI because the tests start a
dozen of them, and a framework takes longer to import than they have to do.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvicorn

_TICKER = """
import os, sys, time
parent, path = os.getppid(), sys.argv[1]
with open(path, "a", buffering=1) as file:
    while os.getppid() == parent:
        file.write(f"{time.monotonic()}\\n")
        time.sleep(0.004)
"""

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class FakeBehaviour:
    """How the server behaves.

    Attributes:
        folder: where it leaves ``NAME.pid``, ``NAME.answered`` (from when to when, a line a request) and, as the sign
            that its worker process runs, ``NAME.ticks``.
        name: what its files are called.
        tokens_per_step: tokens that come in one chunk.
        step_seconds: time between two chunks.
        counters: it counts speculation and tells.
        differs_on: its answer to this prompt has another last word.
        refuses: it answers this prompt with HTTP 400.
        ends_after: it exits at the request after this many.
    """

    folder: str
    name: str
    tokens_per_step: int = 1
    step_seconds: float = 0.002
    counters: bool = False
    differs_on: str | None = None
    refuses: str | None = None
    ends_after: int | None = None

    def command(self, port: int) -> tuple[str, ...]:
        """How to start such a server."""
        return (sys.executable, __file__, str(port), json.dumps(asdict(self)))


class FakeServer:
    """The server's application."""

    def __init__(self, behaviour: FakeBehaviour) -> None:
        self._behaviour = behaviour
        self._requests = 0
        names = ("verify_steps", "emitted_tokens", "drafted_tokens", "verified_tokens", "accepted_tokens")
        self._totals = dict.fromkeys(names, 0)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        assert scope["type"] == "http"
        match scope["path"]:
            case "/v1/models":
                await _reply(send, {"object": "list", "data": [{"id": "fake", "object": "model"}]})
            case "/health":
                await _reply(send, {})
            case "/v1/speculation" if self._behaviour.counters:
                await _reply(send, {"since_start": self._totals})
            case "/v1/chat/completions":
                await self._chat(await _body(receive), send)
            case _:
                await _reply(send, {"error": {"message": "no such route"}}, status=404)

    async def _chat(self, body: dict[str, Any], send: Send) -> None:
        began = time.monotonic()
        if self._requests == self._behaviour.ends_after:
            print("the fake engine gives up", flush=True)
            os._exit(3)
        self._requests += 1
        prompt = body["messages"][0]["content"]
        if prompt == self._behaviour.refuses:
            await _reply(send, {"error": {"message": f"will not answer: {prompt}"}}, status=400)
            return
        await _start(send, "text/event-stream")
        await self._stream(prompt, body["max_tokens"], send)
        ended = time.monotonic()  # now: with the last byte the benchmark may go on and freeze this process
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        with Path(self._behaviour.folder, f"{self._behaviour.name}.answered").open("a") as file:
            file.write(f"{began} {ended}\n")

    async def _stream(self, prompt: str, tokens: int, send: Send) -> None:
        behaviour, totals = self._behaviour, self._totals
        words = [f" {prompt}-{number}" for number in range(tokens)]
        if prompt == behaviour.differs_on:
            words[-1] += "!"
        await _send_chunk(send, [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for start in range(0, tokens, behaviour.tokens_per_step):
            await asyncio.sleep(behaviour.step_seconds)
            step = words[start : start + behaviour.tokens_per_step]
            totals["verify_steps"] += 1
            totals["emitted_tokens"] += len(step)
            totals["accepted_tokens"] += len(step) - 1
            totals["drafted_tokens"] += behaviour.tokens_per_step + 1
            totals["verified_tokens"] += behaviour.tokens_per_step
            await _send_chunk(send, [{"index": 0, "delta": {"content": "".join(step)}, "finish_reason": None}])
        await _send_chunk(send, [{"index": 0, "delta": {}, "finish_reason": "length"}])
        await _send_chunk(send, [], usage={"prompt_tokens": 7, "completion_tokens": tokens})


async def _body(receive: Receive) -> dict[str, Any]:
    raw, more = b"", True
    while more:
        message = await receive()
        raw, more = raw + message.get("body", b""), message.get("more_body", False)
    body = json.loads(raw)
    assert isinstance(body, dict)
    return body


async def _start(send: Send, content_type: str, status: int = 200) -> None:
    headers = [(b"content-type", content_type.encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _reply(send: Send, payload: dict[str, Any], status: int = 200) -> None:
    await _start(send, "application/json", status)
    await send({"type": "http.response.body", "body": json.dumps(payload).encode()})


async def _send_chunk(send: Send, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> None:
    chunk = json.dumps({"object": "chat.completion.chunk", "choices": choices, "usage": usage}, ensure_ascii=False)
    await send({"type": "http.response.body", "body": f"data: {chunk}\n\n".encode(), "more_body": True})


def main() -> None:
    """Serve until stopped."""
    port, behaviour = int(sys.argv[1]), FakeBehaviour(**json.loads(sys.argv[2]))
    folder = Path(behaviour.folder)
    ticker = subprocess.Popen([sys.executable, "-I", "-S", "-c", _TICKER, str(folder / f"{behaviour.name}.ticks")])
    (folder / f"{behaviour.name}.pid").write_text(f"{os.getpid()} {ticker.pid}")
    uvicorn.run(FakeServer(behaviour), host="127.0.0.1", port=port, log_level="warning", lifespan="off")


if __name__ == "__main__":
    main()
