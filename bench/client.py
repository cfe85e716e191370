"""The load: prompts sent to one OpenAI-compatible server over HTTP, every answer streamed and timed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from bench.loopback import asynchronous_client

__all__ = ["Answer", "Load", "LoadResult", "Target", "closed_loop", "run_load"]

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Target:
    """A server to ask: its base URL without a trailing slash, and the model name that it answers to."""

    base_url: str
    model: str


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server.

    Attributes:
        prompts: one user message each, asked in this order.
        concurrency: requests in flight at the same time.
        max_tokens: longest answer, tokens.
        temperature: 0 for greedy answers.
        seed: seed of the first request, the others follow; sent only where the temperature is above 0.
        cache_salt: requests share cached prefixes only with requests of the same salt (in llama.cpp, which knows no
            salts, with none); ``None`` sends none.
        timeout: seconds without a byte after which a request has failed.
        shortest: where the limits of the answers spread evenly from here to ``max_tokens``; ``None`` gives all of
            them the same limit, so that without drafts requests begin and end in step.
    """

    prompts: tuple[str, ...]
    concurrency: int
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    cache_salt: str | None = None
    timeout: float = 300.0
    shortest: int | None = None

    def limit(self, index: int) -> int:
        """Most tokens of the answer to a prompt."""
        if self.shortest is None:
            return self.max_tokens
        spread = index * _GOLDEN % 1  # neighbours lie far apart, and any number of them are spread evenly
        return self.shortest + int(spread * (self.max_tokens - self.shortest + 1))


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished request; times in seconds.

    Attributes:
        text: the whole answer.
        prompt_tokens: as the server counts them.
        output_tokens: as the server counts them, the end-of-sequence token included.
        time_to_first_token: from sending the request to the first piece of text.
        time_per_output_token: (last token - first token) / (tokens - 1); ``None`` for answers of one token.
        end_to_end: from sending the request to the last token.
        error: why there is no answer; the other fields mean nothing then.
    """

    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    time_to_first_token: float = 0.0
    time_per_output_token: float | None = None
    end_to_end: float = 0.0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The answers in the order of the prompts, and the seconds from the first request to the last answer."""

    answers: tuple[Answer, ...]
    wall_seconds: float


def run_load(target: Target, load: Load) -> LoadResult:
    """Run ``closed_loop`` to its end from code that is not asynchronous."""
    return asyncio.run(closed_loop(target, load))


async def closed_loop(target: Target, load: Load) -> LoadResult:
    """Keep ``load.concurrency`` requests in flight until all prompts are answered.

    The client is made anew for each load: a connection kept from before the server was frozen may be one that the
    server closes the moment it is resumed.
    """
    answers: list[Answer] = [Answer(error="not asked")] * len(load.prompts)
    queue = iter(range(len(load.prompts)))

    async with asynchronous_client(target.base_url, load.timeout, load.concurrency) as client:

        async def work() -> None:
            for index in queue:
                answers[index] = await _ask(client, _request_body(target, load, index))

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(load.concurrency, len(load.prompts))):
                group.create_task(work())
        return LoadResult(tuple(answers), time.perf_counter() - started)


def _request_body(target: Target, load: Load, index: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": target.model,
        "messages": [{"role": "user", "content": load.prompts[index]}],
        "max_tokens": load.limit(index),
        "temperature": load.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.temperature > 0:
        body["seed"] = load.seed + index
    if load.cache_salt is not None:
        body["cache_salt"] = load.cache_salt
        body["cache_prompt"] = False
    return body


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    timeline = _Timeline(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                detail = (await response.aread()).decode("utf-8", errors="replace")
                return Answer(error=f"HTTP {response.status_code}: {_error_message(detail)}")
            async for line in _lines(response):
                if line.startswith(b"data:"):
                    timeline.take(line[5:].decode("utf-8", errors="replace").strip(), time.perf_counter())
    except httpx.HTTPError as error:
        return Answer(error=f"{type(error).__name__}: {error}".rstrip(": "))
    except _StreamError as error:
        return Answer(error=str(error))
    return timeline.answer()


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of a body as they arrive. httpx's own splits at every Unicode line break, which JSON may contain."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    yield rest


class _StreamError(Exception):
    """The stream holds an error, or something that is not a chat completion."""


class _Timeline:
    """What one stream has brought so far, and when."""

    def __init__(self, sent: float) -> None:
        self._sent = sent
        self._first: float | None = None
        self._last = sent
        self._pieces: list[str] = []
        self._usage: dict[str, Any] | None = None

    def take(self, data: str, now: float) -> None:
        """Take in the payload of one server-sent event that arrived at ``now``."""
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
            if event.get("error"):
                raise _StreamError(f"error in the stream: {_error_message(data)}")
            self._usage = event.get("usage") or self._usage
            for choice in event["choices"]:
                self._take_choice(choice, now)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _StreamError(f"not a chat completion chunk: {data[:200]}") from error

    def _take_choice(self, choice: dict[str, Any], now: float) -> None:
        delta = choice.get("delta") or {}
        text = "".join(delta.get(key) or "" for key in ("reasoning_content", "reasoning", "content"))
        if text:
            self._pieces.append(text)
        # The chunk that only announces the role carries no token; the last one may carry only the end-of-sequence.
        if text or choice.get("finish_reason"):
            self._first = now if self._first is None else self._first
            self._last = now

    def answer(self) -> Answer:
        """The finished request."""
        if self._first is None:
            return Answer(error="the stream ended without an answer")
        if not self._usage:
            # Counting chunks instead would be wrong: with speculation one chunk holds several tokens.
            return Answer(error="the server reports no token usage for streams")
        tokens = int(self._usage["completion_tokens"])
        return Answer(
            text="".join(self._pieces),
            prompt_tokens=int(self._usage.get("prompt_tokens") or 0),
            output_tokens=tokens,
            time_to_first_token=self._first - self._sent,
            time_per_output_token=(self._last - self._first) / (tokens - 1) if tokens > 1 else None,
            end_to_end=self._last - self._sent,
        )


def _error_message(payload: str) -> str:
    """The message of an OpenAI error payload, or the start of whatever it is instead."""
    try:
        error = json.loads(payload)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return payload.strip()[:200]
