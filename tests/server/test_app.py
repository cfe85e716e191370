"""Our routes around another application, over HTTP without a server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from scheduler.counters import SpeculationHistory
from scheduler.draft_limit import DRAFT_LIMIT_KEY
from server.app import build
from server.speculation_report import SpeculationSource


def _app(other: FastAPI | None = None, lifespan: Any = None, drafter: str | None = None) -> FastAPI:
    source = SpeculationSource(drafter, 5 if drafter else 0, SpeculationHistory())
    return build(other or _other_app(), lifespan or nullcontext(), source)


async def _request(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.request(method, path, **options)


def _other_app() -> FastAPI:
    other = FastAPI()

    @other.get("/v1/models")
    async def models() -> dict[str, str]:
        return {"from": "the other application"}

    @other.post("/v1/completions")
    async def complete(request: Request) -> Any:
        return await request.json()

    return other


async def test_the_report_is_ours() -> None:
    report = (await _request(_app(drafter="tiny"), "GET", "/v1/speculation")).json()
    assert report["enabled"] is True and report["drafter"] == "tiny" and report["max_draft_tokens"] == 5


async def test_other_paths_are_the_other_applications() -> None:
    app = _app()
    assert (await _request(app, "GET", "/v1/models")).json() == {"from": "the other application"}
    assert (await _request(app, "GET", "/v1/nothing")).status_code == 404


@pytest.mark.parametrize(("drafter", "limit"), [("tiny", 4), (None, 0)])
async def test_limits_of_requests_reach_the_other_application(drafter: str | None, limit: int) -> None:
    sent = {"prompt": "a", "speculation": {"max_draft_tokens": 4}}
    response = await _request(_app(drafter=drafter), "POST", "/v1/completions", json=sent)
    assert response.json() == {"prompt": "a", "vllm_xargs": {DRAFT_LIMIT_KEY: limit}}


async def test_wrong_limits_do_not() -> None:
    sent = {"speculation": {"max_draft_tokens": -4}}
    response = await _request(_app(drafter="tiny"), "POST", "/v1/completions", json=sent)
    assert response.status_code == 400 and response.json()["error"]["param"] == "speculation.max_draft_tokens"


@pytest.mark.parametrize("fails", [False, True])
async def test_life_span_of_the_other_application_runs_and_ends(fails: bool) -> None:
    events: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        events.append("start")
        try:
            yield
        finally:
            events.append("end")

    app = _app(lifespan=lifespan())
    try:
        async with app.router.lifespan_context(app):
            assert events == ["start"]
            if fails:
                raise ValueError("on purpose")
    except ValueError:
        assert fails
    assert events == ["start", "end"]
