"""The member ``speculation`` of a request's body: how much may be drafted for this request."""

import json
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scheduler.draft_limit import DRAFT_LIMIT_KEY

# vLLM's routes whose bodies know ``vllm_xargs``.
ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})

_MEMBER = "speculation"
_QUOTED_MEMBER = f'"{_MEMBER}"'.encode()
_LONGEST_QUOTE = 80  # characters of a wrong value that are repeated in the answer


class _Speculation(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    max_draft_tokens: Annotated[int, Field(ge=0)] | None = None


class _WrongMemberError(Exception):
    """``speculation`` is not what it must be; holds OpenAI's ``message`` and ``param``."""

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param


class RequestSpeculation:
    """Moves ``"speculation": {"max_draft_tokens": N}`` from requests' bodies to where vLLM carries it to the engine.

    A body that does not name the member reaches the application as it came, without being parsed; one that does is
    parsed and written anew. Either way it is held until it is complete, as the application does.

    Args:
        app: answers the requests.
        max_draft_tokens: longest draft; higher limits mean this one.
    """

    def __init__(self, app: ASGIApp, max_draft_tokens: int):
        self._app = app
        self._max_draft_tokens = max_draft_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in ROUTES:
            await self._app(scope, receive, send)
            return
        messages, named = await _receive_body(receive)
        if named:
            try:
                changed = self._changed(b"".join(message.get("body", b"") for message in messages))
            except _WrongMemberError as error:
                await _bad_request(error)(scope, receive, send)
                return
            if changed is not None:
                messages = deque([{"type": "http.request", "body": changed, "more_body": False}])
                scope = {**scope, "headers": _with_length(scope["headers"], len(changed))}

        async def replay() -> Message:
            return messages.popleft() if messages else await receive()

        await self._app(scope, replay, send)

    def _changed(self, body: bytes) -> bytes | None:
        """The body with the limit where vLLM looks for it; ``None`` to leave the body, and its faults, to vLLM."""
        try:
            return self._moved(json.loads(body))
        except (ValueError, RecursionError):  # no JSON, or nested too deeply
            return None

    def _moved(self, request: object) -> bytes | None:
        if not isinstance(request, dict) or request.get(_MEMBER) is None:
            return None
        limit = _read(request.pop(_MEMBER)).max_draft_tokens
        extra = request.get("vllm_xargs")
        extra = {} if extra is None else extra
        if limit is None or not isinstance(extra, dict):
            return None
        request["vllm_xargs"] = {**extra, DRAFT_LIMIT_KEY: min(limit, self._max_draft_tokens)}
        return json.dumps(request).encode()


async def _receive_body(receive: Receive) -> tuple[deque[Message], bool]:
    """The messages of a body up to its end, or the client's, and whether the member's name is in it."""
    messages: deque[Message] = deque()
    named, end = False, b""
    overlap = len(_QUOTED_MEMBER) - 1
    while True:
        message = await receive()
        messages.append(message)
        part = message.get("body", b"")
        named = named or _QUOTED_MEMBER in part or _QUOTED_MEMBER in end + part[:overlap]
        end = (end + part[-overlap:])[-overlap:]
        if not message.get("more_body", False):
            return messages, named


def _read(member: object) -> _Speculation:
    """The member, checked.

    Raises:
        _WrongMemberError: it is not what it must be.
    """
    try:
        return _Speculation.model_validate(member)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
    name = ".".join([_MEMBER, *map(str, error["loc"])])
    if not error["loc"]:
        expected = 'an object such as {"max_draft_tokens": 0} was expected'
    elif error["type"] == "extra_forbidden":
        expected = f"{_MEMBER} has no such member, only {' and '.join(_Speculation.model_fields)}"
    else:
        expected = "a whole number of at least 0 was expected (0: no drafts)"
    raise _WrongMemberError(f"{_cut(name)} is {_cut(json.dumps(error['input']))}; {expected}", _cut(name))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…"


def _bad_request(error: _WrongMemberError) -> JSONResponse:
    content = {"message": str(error), "type": "invalid_request_error", "param": error.param, "code": None}
    return JSONResponse({"error": content}, status_code=400)


def _with_length(headers: Sequence[tuple[bytes, bytes]], length: int) -> list[Any]:
    return [(name, str(length).encode() if name == b"content-length" else value) for name, value in headers]
