"""Our routes around another application, over HTTP without a server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from scheduler.counters import SpeculationHistory
from server.app import SpeculationSource, build


def _source(drafter: str | None, history: SpeculationHistory, asked: list[int]) -> SpeculationSource:
    async def counters() -> dict[str, Any]:
        asked.append(1)
        return {"draft_tokens": 40}

    return SpeculationSource(drafter, 5 if drafter else 0, history, counters)


async def _get(app: FastAPI, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.get(path)


def _other_app() -> FastAPI:
    other = FastAPI()

    @other.get("/v1/models")
    async def models() -> dict[str, str]:
        return {"from": "the other application"}

    return other


async def test_report_counts_steps_drafts_and_positions() -> None:
    history, asked = SpeculationHistory(), list[int]()
    app = build(_other_app(), nullcontext(), _source("tiny", history, asked))
    history.add(0.0, 10, [8, 6, 4], [6, 3, 1])

    report = (await _get(app, "/v1/speculation")).json()

    assert asked == [1]
    assert report["enabled"] is True and report["drafter"] == "tiny" and report["max_draft_tokens"] == 5
    assert report["since_start"] == {
        "verify_steps": 10,
        "drafted_tokens": 40,
        "verified_tokens": 18,
        "accepted_tokens": 10,
        "emitted_tokens": 20,
        "emitted_per_verify_step": 2.0,
        "acceptance_rate": 0.5556,
        "positions": [
            {"position": 0, "verified": 8, "accepted": 6, "acceptance_rate": 0.75},
            {"position": 1, "verified": 6, "accepted": 3, "acceptance_rate": 0.5},
            {"position": 2, "verified": 4, "accepted": 1, "acceptance_rate": 0.25},
        ],
    }


async def test_without_a_drafter_the_engine_is_not_asked_and_rates_are_null() -> None:
    asked: list[int] = []
    app = build(_other_app(), nullcontext(), _source(None, SpeculationHistory(), asked))

    report = (await _get(app, "/v1/speculation")).json()

    assert asked == [] and report["enabled"] is False and report["drafter"] is None
    assert report["since_start"]["emitted_per_verify_step"] is None
    assert report["since_start"]["acceptance_rate"] is None
    assert report["last_minute"] == report["since_start"]


async def test_other_paths_are_the_other_applications() -> None:
    app = build(_other_app(), nullcontext(), _source(None, SpeculationHistory(), []))
    assert (await _get(app, "/v1/models")).json() == {"from": "the other application"}
    assert (await _get(app, "/v1/nothing")).status_code == 404


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

    app = build(_other_app(), lifespan(), _source(None, SpeculationHistory(), []))
    try:
        async with app.router.lifespan_context(app):
            assert events == ["start"]
            if fails:
                raise ValueError("on purpose")
    except ValueError:
        assert fails
    assert events == ["start", "end"]
