"""``slipstream serve``: from settings to a running server, and down again."""

import asyncio
import os
import shlex
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scheduler.options import TargetWeights
from server.drafter_store import resolve_drafter
from server.engine_output import EngineOutput
from server.errors import ServerStartError
from server.model_store import resolve_model
from server.preflight import (
    bind,
    check_drafter,
    check_length,
    check_memory,
    check_trace_file,
    check_weight_format,
    read_target_config,
)
from server.progress import ProgressBar
from server.settings import Settings
from server.step_times import step_times_file, step_times_identity

if TYPE_CHECKING:
    import uvicorn
    from vllm.v1.engine.async_llm import AsyncLLM

    from scheduler.counters import SpeculationHistory

_VLLM_LEVELS = {"debug": "DEBUG", "info": "WARNING", "warning": "WARNING", "error": "ERROR"}


@dataclass(frozen=True, slots=True)
class Served:
    """What will be served, resolved and checked."""

    settings: Settings
    model: Path
    name: str
    drafter: Path | None

    @property
    def rounding(self) -> str:
        """The format that the target's weights are rounded to; empty when they stay what they are."""
        weights = TargetWeights(self.settings.model.weight_format)
        return weights.value if weights.changes_model else ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the API: a rounded model is another model, and the list of models says so."""
        return (self.name, f"{self.name}:{self.rounding}") if self.rounding else (self.name,)


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    Raises:
        SlipstreamError: something the user gave cannot be used; nothing is left running.
    """
    listener = bind(settings.server.host, settings.server.port)
    try:
        served = _prepare(settings)
        with _StartupInterrupt() as startup:
            return asyncio.run(_serve(served, listener, startup))
    finally:
        listener.close()


def _prepare(settings: Settings) -> Served:
    with ProgressBar("model") as progress:
        model = resolve_model(settings.model.source, settings.model.cache_dir, progress)
    target = read_target_config(model)
    check_length(settings, target)
    check_weight_format(settings)
    check_trace_file(settings.speculation.trace_file)
    drafter = resolve_drafter(settings.speculation.drafter) if settings.speculation.enabled else None
    if drafter is not None:
        check_drafter(drafter, model, target)
    check_memory(settings, target, drafter)
    return Served(settings, model, settings.model.served_name or Path(settings.model.source).name, drafter)


async def _serve(served: Served, listener: socket.socket, startup: "_StartupInterrupt") -> int:
    started = time.monotonic()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", _VLLM_LEVELS[served.settings.server.log_level])
    print("starting the engine …", file=sys.stderr, flush=True)
    from scheduler.counters import SpeculationHistory

    history = SpeculationHistory()
    output = EngineOutput(show=served.settings.server.log_level == "debug")
    engine = _start_engine(served, history, output)
    try:
        http = await _http_server(served, engine, history)
        output.pass_on()
        startup.hand_over(http)
        print(_ready_block(served, time.monotonic() - started), file=sys.stderr, flush=True)
        await http.serve(sockets=[listener])
    finally:
        from scheduler.engine import stop_engine

        stop_engine(engine)
    return 0


def _start_engine(served: Served, history: "SpeculationHistory", output: EngineOutput) -> "AsyncLLM":
    try:
        with output.captured():
            from scheduler.engine import engine_arguments, start_engine

            return start_engine(engine_arguments(*_engine_shape(served)), history)
    except Exception as error:
        raise ServerStartError(f"the engine did not start: {output.cause() or error}") from error


def _engine_shape(served: Served) -> Any:
    from cuda_ext.library import library_path
    from drafter.options import PathSearch, ProposalOptions
    from scheduler.engine import EngineShape
    from scheduler.options import DrafterOptions, EngineOptions, PolicyName, PolicyOptions

    model, engine, speculation = served.settings.model, served.settings.engine, served.settings.speculation
    shape = EngineShape(
        model=str(served.model),
        served_name=served.name,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_cache_bytes=int(engine.kv_cache_gib * 2**30),
        block_size=engine.block_size,
        enforce_eager=engine.enforce_eager,
        enable_prefix_caching=engine.prefix_caching,
        seed=engine.seed,
    )
    weights = TargetWeights(model.weight_format)
    if served.drafter is None:
        return shape, EngineOptions(weights=weights, instruction_set=engine.instruction_set)
    proposal = ProposalOptions(
        max_draft_tokens=speculation.max_draft_tokens,
        path=PathSearch(speculation.path),
        beam_width=speculation.beam_width,
        max_passes=speculation.max_passes,
        observe_threshold=speculation.observe_threshold,
        calibrated_threshold=speculation.calibrated_threshold,
        stop_at_end=speculation.stop_at_end,
        coupled_sampling=speculation.coupled_sampling,
    )
    identity = step_times_identity(served.settings, served.model, served.drafter, library_path("cpu").name)
    policy = PolicyOptions(
        name=PolicyName(speculation.policy),
        min_draft_tokens=speculation.min_draft_tokens,
        survival_floor=speculation.survival_floor,
        repetition=speculation.repetition,
        cost_file=step_times_file(model.cache_dir, identity),
        cost_identity=identity,
        calibrate=True,
        trace_file=speculation.trace_file,
    )
    drafter = DrafterOptions(served.drafter, proposal, policy)
    return shape, EngineOptions(drafter, weights=weights, instruction_set=engine.instruction_set)


async def _http_server(served: Served, engine: "AsyncLLM", history: "SpeculationHistory") -> "uvicorn.Server":
    import uvicorn
    from prometheus_client import REGISTRY

    from server.app import build
    from server.metrics import SpeculationCollector
    from server.speculation_report import SpeculationSource
    from server.vllm_adapter import build_openai_app, lifespan_of

    settings = served.settings
    openai_app = await build_openai_app(engine, str(served.model), served.names)
    speculation = SpeculationSource(
        drafter=served.drafter.name if served.drafter else None,
        max_draft_tokens=settings.speculation.max_draft_tokens if served.drafter else 0,
        history=history,
    )
    REGISTRY.register(SpeculationCollector(speculation))  # where vLLM registers its own, so that /metrics has both
    app = build(openai_app, lifespan_of(openai_app), speculation)
    config = uvicorn.Config(
        app,
        log_level=settings.server.log_level,
        access_log=settings.server.log_level == "debug",
        log_config=None,
        timeout_graceful_shutdown=settings.server.shutdown_grace_seconds,
    )
    return uvicorn.Server(config)


def _ready_block(served: Served, seconds: float) -> str:
    """What a user wants to know once, when the server is ready."""
    server = served.settings.server
    host = f"[{server.host}]" if ":" in server.host else server.host
    reachable = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    url = f"http://{reachable}:{server.port}"
    drafter = (
        "off"
        if served.drafter is None
        else (f"{served.drafter.name}, up to {served.settings.speculation.max_draft_tokens} tokens a step")
    )
    rounding = f", weights rounded to {served.rounding}" if served.rounding else ""
    body = f'{{"model": "{served.name}", "messages": [{{"role": "user", "content": "Say hello."}}]}}'
    return "\n".join(
        [
            "",
            f"  Slipstream is ready ({seconds:.0f} s)",
            f"  URL      {url}/v1",
            f"  model    {served.name} ({served.settings.model.dtype}{rounding})",
            f"  drafter  {drafter}",
            "",
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
            "",
        ]
    )


class _StartupInterrupt:
    """Makes SIGTERM end the start-up like Ctrl-C does, until requests are served: then it is uvicorn's to handle.

    uvicorn raises the signal again when it has shut down; by then there is nothing left to interrupt.
    """

    def __init__(self) -> None:
        self._http: uvicorn.Server | None = None

    def hand_over(self, http: "uvicorn.Server") -> None:
        """From now on the signal asks ``http`` to exit, as uvicorn's own handler will."""
        self._http = http

    def __enter__(self) -> "_StartupInterrupt":
        self._previous = signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _interrupt(self, *_: object) -> None:
        if self._http is None:
            raise KeyboardInterrupt
        self._http.should_exit = True
