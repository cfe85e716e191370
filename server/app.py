"""The HTTP application: our routes in front, vLLM's OpenAI application behind them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from scheduler.counters import SpeculationHistory, SpeculationTotals

_POLL_SECONDS = 5.0


class PositionReport(BaseModel):
    """One draft slot: how often it was verified and accepted."""

    model_config = ConfigDict(frozen=True)

    position: int
    verified: int
    accepted: int
    acceptance_rate: float | None


class TotalsReport(BaseModel):
    """Counts over some time; rates are null while there is nothing to divide by.

    A verify step is one decode step of one request, whether drafts were verified in it or not.
    """

    model_config = ConfigDict(frozen=True)

    verify_steps: int
    drafted_tokens: int
    verified_tokens: int
    accepted_tokens: int
    emitted_tokens: int
    emitted_per_verify_step: float | None
    acceptance_rate: float | None
    positions: list[PositionReport]

    @classmethod
    def of(cls, totals: SpeculationTotals) -> "TotalsReport":
        """The report of ``totals``."""
        counts = zip(totals.verified_by_position, totals.accepted_by_position, strict=True)
        return cls(
            verify_steps=totals.verify_steps,
            drafted_tokens=totals.drafted_tokens,
            verified_tokens=totals.verified_tokens,
            accepted_tokens=totals.accepted_tokens,
            emitted_tokens=totals.emitted_tokens,
            emitted_per_verify_step=_ratio(totals.emitted_tokens, totals.verify_steps),
            acceptance_rate=_ratio(totals.accepted_tokens, totals.verified_tokens),
            positions=[
                PositionReport(position=i, verified=v, accepted=a, acceptance_rate=_ratio(a, v))
                for i, (v, a) in enumerate(counts)
            ],
        )


class SpeculationReport(BaseModel):
    """Answer of ``GET /v1/speculation``."""

    model_config = ConfigDict(frozen=True)

    enabled: bool
    drafter: str | None
    max_draft_tokens: int
    since_start: TotalsReport
    last_minute: TotalsReport


@dataclass(frozen=True, slots=True)
class SpeculationSource:
    """Where the application reads speculation from.

    Attributes:
        drafter: name of the drafter, ``None`` when drafting is off.
        max_draft_tokens: longest draft, 0 when drafting is off.
        history: counts fed by the engine's statistics.
        drafter_counters: asks the engine for the drafter's own counters.
    """

    drafter: str | None
    max_draft_tokens: int
    history: SpeculationHistory
    drafter_counters: Callable[[], Awaitable[Mapping[str, Any]]]

    async def refresh(self) -> None:
        """Take over the drafter's counters."""
        if self.drafter is not None:
            counters = await self.drafter_counters()
            self.history.set_drafted(time.monotonic(), counters["draft_tokens"])


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
            poll = asyncio.create_task(_poll(speculation))
            try:
                yield
            finally:
                poll.cancel()
                with suppress(asyncio.CancelledError):
                    await poll

    app = FastAPI(title="Slipstream", lifespan=run, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/v1/speculation")
    async def report() -> SpeculationReport:
        await speculation.refresh()
        history = speculation.history
        return SpeculationReport(
            enabled=speculation.drafter is not None,
            drafter=speculation.drafter,
            max_draft_tokens=speculation.max_draft_tokens,
            since_start=TotalsReport.of(history.totals),
            last_minute=TotalsReport.of(history.recent(time.monotonic())),
        )

    app.mount("/", openai_app)
    return app


async def _poll(speculation: SpeculationSource) -> None:
    """Keep the drafted count of the last minute honest; asks nothing of an idle engine."""
    seen = -1
    while True:
        await asyncio.sleep(_POLL_SECONDS)
        if speculation.history.totals.verify_steps != seen:
            seen = speculation.history.totals.verify_steps
            await speculation.refresh()


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
