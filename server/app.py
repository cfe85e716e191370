"""The HTTP application: our routes in front, vLLM's OpenAI application behind them."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI

from server.request_speculation import RequestSpeculation
from server.speculation_report import SpeculationReport, SpeculationSource


def build(openai_app: FastAPI, lifespan: AbstractAsyncContextManager[None], speculation: SpeculationSource) -> FastAPI:
    """Our application around vLLM's.

    Args:
        openai_app: answers every path that we do not.
        lifespan: runs its life-span handlers.
        speculation: what ``/v1/speculation`` reports.
    """

    @asynccontextmanager
    async def run(_: FastAPI) -> AsyncIterator[None]:
        async with lifespan:
            yield

    app = FastAPI(title="Slipstream", lifespan=run, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/v1/speculation")
    async def report() -> SpeculationReport:
        return SpeculationReport.of(speculation)

    app.mount("/", RequestSpeculation(openai_app, speculation.max_draft_tokens))
    return app
