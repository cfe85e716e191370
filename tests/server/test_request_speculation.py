"""What becomes of a request's body on its way to vLLM's application."""

import json
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from scheduler.draft_limit import DRAFT_LIMIT_KEY
from server.request_speculation import ROUTES, RequestSpeculation

_CHAT = "/v1/chat/completions"


class Application:
    """Stands behind the one under test and keeps what reaches it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.messages: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            self.messages.append(message)
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.bodies.append(body)
        self.headers.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answered"})


@pytest.fixture
def behind() -> Application:
    return Application()


async def post(behind: Application, content: Any, path: str = _CHAT, limit: int = 5) -> httpx.Response:
    transport = httpx.ASGITransport(RequestSpeculation(behind, limit))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, content=content)


def body(speculation: object, **members: Any) -> bytes:
    return json.dumps({"model": "m", "speculation": speculation, **members}).encode()


@pytest.mark.parametrize("path", sorted(ROUTES))
async def test_the_limit_travels_where_vllm_carries_it(behind: Application, path: str) -> None:
    response = await post(behind, body({"max_draft_tokens": 3}, prompt="Grüße 🎉", temperature=0.1), path)
    assert response.text == "answered"
    assert json.loads(behind.bodies[0]) == {
        "model": "m",
        "prompt": "Grüße 🎉",
        "temperature": 0.1,
        "vllm_xargs": {DRAFT_LIMIT_KEY: 3},
    }
    assert behind.headers[0][b"content-length"] == str(len(behind.bodies[0])).encode()


@pytest.mark.parametrize(("asked", "limit"), [(0, 0), (5, 5), (6, 5), (10**40, 5)])
async def test_limits_beyond_the_servers_mean_the_servers(behind: Application, asked: int, limit: int) -> None:
    await post(behind, body({"max_draft_tokens": asked}))
    assert json.loads(behind.bodies[0])["vllm_xargs"] == {DRAFT_LIMIT_KEY: limit}


@pytest.mark.parametrize("given", [{"session_id": "s"}, {"session_id": "s", DRAFT_LIMIT_KEY: "rubbish"}])
async def test_other_extra_arguments_stay(behind: Application, given: dict[str, Any]) -> None:
    await post(behind, body({"max_draft_tokens": 2}, vllm_xargs=given))
    assert json.loads(behind.bodies[0])["vllm_xargs"] == {"session_id": "s", DRAFT_LIMIT_KEY: 2}


async def test_extra_arguments_may_be_null(behind: Application) -> None:
    await post(behind, body({"max_draft_tokens": 2}, vllm_xargs=None))
    assert json.loads(behind.bodies[0])["vllm_xargs"] == {DRAFT_LIMIT_KEY: 2}


@pytest.mark.parametrize(
    ("speculation", "param", "named", "expected"),
    [
        ({"max_draft_tokens": -1}, "speculation.max_draft_tokens", "-1", "a whole number of at least 0"),
        ({"max_draft_tokens": 2.5}, "speculation.max_draft_tokens", "2.5", "a whole number of at least 0"),
        ({"max_draft_tokens": 2.0}, "speculation.max_draft_tokens", "2.0", "a whole number of at least 0"),
        ({"max_draft_tokens": "3"}, "speculation.max_draft_tokens", '"3"', "a whole number of at least 0"),
        ({"max_draft_tokens": True}, "speculation.max_draft_tokens", "true", "a whole number of at least 0"),
        ({"max_draft_tokens": [1]}, "speculation.max_draft_tokens", "[1]", "a whole number of at least 0"),
        ({"max_draft_tokens": float("nan")}, "speculation.max_draft_tokens", "NaN", "a whole number of at least 0"),
        ({"max_tokens": 3}, "speculation.max_tokens", "3", "no such member, only max_draft_tokens"),
        ({"max_draft_tokens": 3, "on": {}}, "speculation.on", "{}", "no such member, only max_draft_tokens"),
        (3, "speculation", "3", "an object"),
        ("off", "speculation", '"off"', "an object"),
        ([], "speculation", "[]", "an object"),
        (False, "speculation", "false", "an object"),
    ],
)
async def test_anything_else_is_refused_as_openai_would(
    behind: Application, speculation: object, param: str, named: str, expected: str
) -> None:
    response = await post(behind, body(speculation))
    assert response.status_code == 400 and behind.bodies == []
    error = response.json()["error"]
    message = error.pop("message")
    assert response.json().keys() == {"error"}
    assert error == {"type": "invalid_request_error", "param": param, "code": None}
    assert message.startswith(f"{param} is {named}; ") and expected in message


async def test_an_endless_wrong_value_is_not_sent_back(behind: Application) -> None:
    response = await post(behind, body({"max_draft_tokens": "9" * 100_000}))
    assert response.status_code == 400 and len(response.content) < 500
    response = await post(behind, body({"x" * 100_000: 1}))
    assert response.status_code == 400 and len(response.content) < 700


@pytest.mark.parametrize(
    "content",
    [
        b'{"model":"m",  "prompt" : "a"}',
        b"",
        b"\xff\xfe\x00",
        b'{"prompt": "say \\"speculation\\" twice", "a": 1e400, "a": 2}',
        b'{"speculation" : null}',
        b'{"speculation" : {}, "b":  1.0}',
        b'{"speculation" : {"max_draft_tokens" : null} }',
        b'{"metadata" :  {"speculation": {"max_draft_tokens": -1}}}',
        b'["speculation"]',
        b'{"speculation": {"max_draft_tokens": -1}',
        b'"speculation" ' + b"[" * 100_000,
        b"[" * 100_000 + b'"speculation"',
        b'{"speculation": ' + b"9" * 10_000 + b"}",
        b'{"speculation": {"max_draft_tokens": 1}, "vllm_xargs": [1]}',
        b'{"speculation": {"max_draft_tokens": 1}, "vllm_xargs": []}',
    ],
)
async def test_bodies_that_set_no_limit_or_are_vllms_to_refuse_pass_untouched(
    behind: Application, content: bytes
) -> None:
    assert (await post(behind, content)).text == "answered"
    assert behind.bodies == [content]
    assert behind.headers[0].get(b"content-length", b"0") == str(len(content)).encode()


@pytest.mark.parametrize("content", [b'{"prompt": "speculations"}', b'{"speculatio": 1}'])
async def test_a_body_without_the_member_is_not_parsed(
    behind: Application, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("parsed"))
    assert (await post(behind, content)).text == "answered"
    assert behind.bodies == [content]


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/v1/chat/completions/", "/v1/embeddings"])
async def test_other_routes_are_left_alone(behind: Application, path: str) -> None:
    content = body({"max_draft_tokens": -1})
    assert (await post(behind, content, path)).text == "answered"
    assert behind.bodies == [content]


@pytest.mark.parametrize("size", [1, 5, 7, 12, 13, 1000])
@pytest.mark.parametrize("limit", [2, -1])
async def test_a_body_may_come_in_pieces(behind: Application, size: int, limit: int) -> None:
    whole = body({"max_draft_tokens": limit}, prompt="in pieces")

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(whole), size):
            yield whole[start : start + size]

    response = await post(behind, pieces())
    assert response.status_code == (200 if limit == 2 else 400)
    if limit == 2:
        assert json.loads(behind.bodies[0])["vllm_xargs"] == {DRAFT_LIMIT_KEY: 2}


async def call(behind: Application, messages: Sequence[Message], **scope: Any) -> list[Message]:
    """Run the application over given messages; what it sends."""
    coming, answered = iter(messages), list[Message]()

    async def receive() -> Message:
        return next(coming)

    async def send(message: Message) -> None:
        answered.append(message)

    whole = {"type": "http", "method": "POST", "path": _CHAT, "headers": [], **scope}
    await RequestSpeculation(behind, 5)(whole, receive, send)
    return answered


async def test_messages_are_handed_on_as_they_came(behind: Application) -> None:
    messages: list[Message] = [
        {"type": "http.request", "body": b'{"a":', "more_body": True},
        {"type": "http.request", "body": b"", "more_body": True},
        {"type": "http.request", "body": b"1}"},
    ]
    await call(behind, messages)
    assert behind.messages == messages


@pytest.mark.parametrize("start", [b'{"a":', b'{"speculation": {"max_draft_tokens": -1'])
async def test_a_client_that_leaves_in_the_middle_is_the_applications_matter(behind: Application, start: bytes) -> None:
    unfinished: Message = {"type": "http.request", "body": start, "more_body": True}
    messages: list[Message] = [unfinished, {"type": "http.disconnect"}]
    await call(behind, messages)
    assert behind.messages == messages


async def test_no_depth_of_nesting_is_too_much(behind: Application) -> None:
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() + 20):
        deep = b"[" * depth + b"]" * depth
        right = b'{"speculation": {"max_draft_tokens": 1}, "deep": ' + deep + b"}"
        wrong = b'{"speculation": {"max_draft_tokens": ' + deep + b"}}"
        assert [message["type"] for message in await call(behind, [{"type": "http.request", "body": right}])]
        assert [message["type"] for message in await call(behind, [{"type": "http.request", "body": wrong}])]


async def test_after_the_body_the_application_hears_of_the_client() -> None:
    heard = []

    async def listening(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([await receive(), await receive()])

    messages: list[Message] = [
        {"type": "http.request", "body": body({"max_draft_tokens": 1})},
        {"type": "http.disconnect"},
    ]
    await call(listening, messages)  # type: ignore[arg-type]
    assert [message["type"] for message in heard] == ["http.request", "http.disconnect"]
    assert DRAFT_LIMIT_KEY.encode() in heard[0]["body"]


@pytest.mark.parametrize("scope", [{"type": "lifespan"}, {"type": "websocket"}, {"method": "GET"}])
async def test_what_is_no_post_is_not_read(behind: Application, scope: dict[str, Any]) -> None:
    first: Message = {"type": "anything", "body": body({"max_draft_tokens": -1})}
    await call(behind, [first], **scope)
    assert behind.messages == [first]
