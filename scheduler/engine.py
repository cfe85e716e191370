"""Building the vLLM engine that serves, measures and collects: one set of arguments for all three."""

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from scheduler.counters import SpeculationHistory
from scheduler.options import EngineOptions
from scheduler.vllm_metrics import SpeculationStatLogger


@dataclass(frozen=True, slots=True)
class EngineShape:
    """Size and precision of the engine.

    Attributes:
        model: folder of the target.
        served_name: the model's name in metrics; the folder without one.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``.
        max_model_len: longest prompt and answer together, tokens.
        max_num_seqs: requests that run at the same time.
        max_num_batched_tokens: tokens of one step; longer prompts are read in chunks of this size.
        kv_cache_bytes: memory for K/V pages, the drafter's included; ``None`` lets vLLM decide.
        block_size: tokens of one KV page.
        enforce_eager: run without compilation.
        enable_prefix_caching: reuse the pages of equal prefixes.
        seed: the engine's seed, which requests without one of their own derive theirs from.
    """

    model: str
    served_name: str | None = None
    dtype: str = "float32"
    max_model_len: int = 4096
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    kv_cache_bytes: int | None = None
    block_size: int = 32
    enforce_eager: bool = True
    enable_prefix_caching: bool = True
    seed: int = 0


def engine_arguments(shape: EngineShape, options: EngineOptions) -> dict[str, Any]:
    """Keyword arguments of vLLM's ``AsyncEngineArgs`` for our engine; ``options`` without a proposer decode plainly."""
    arguments: dict[str, Any] = {
        **plain_arguments(shape),
        "distributed_executor_backend": "scheduler.vllm_executor.InlineExecutor",
        "worker_cls": "scheduler.vllm_worker.SlipstreamWorker",
        "scheduler_cls": "scheduler.vllm_scheduler.SlipstreamScheduler",
        "additional_config": options.to_additional_config(),
    }
    if options.drafter or options.recorder:
        arguments["speculative_config"] = {
            "method": "custom_class",
            "model": "scheduler.vllm_proposer.ProposerHost",
            "num_speculative_tokens": options.drafter.proposal.max_draft_tokens if options.drafter else 1,
        }
    return arguments


def plain_arguments(shape: EngineShape) -> dict[str, Any]:
    """The same engine as vLLM ships it, without any class of ours."""
    return {
        "model": shape.model,
        "served_model_name": shape.served_name,
        "dtype": shape.dtype,
        "max_model_len": shape.max_model_len,
        "max_num_seqs": shape.max_num_seqs,
        "max_num_batched_tokens": shape.max_num_batched_tokens,
        "kv_cache_memory_bytes": shape.kv_cache_bytes,
        "block_size": shape.block_size,
        "enforce_eager": shape.enforce_eager,
        "enable_prefix_caching": shape.enable_prefix_caching,
        "enable_chunked_prefill": True,
        "seed": shape.seed,
    }


def start_engine(arguments: dict[str, Any], history: SpeculationHistory | None = None) -> AsyncLLM:
    """Start the engine's processes and wait until they can serve; ``history`` then counts speculation."""
    # Ours extends vLLM's first model runner; without drafting vLLM might choose the second one, past our sampler.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    # vLLM's own loggers cannot read our part of the statistics, which this one takes out.
    loggers = [partial(SpeculationStatLogger, history=history)]
    options = replace(EngineOptions.from_additional_config(arguments["additional_config"]), statistics=True)
    arguments = {**arguments, "additional_config": options.to_additional_config()}
    config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
    if current_platform.is_cpu() and _openmp_survives_forks(os.environ):
        # vLLM's CPU platform has just asked for a fresh interpreter, which would spend seconds on importing again what
        # is here already.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        gc.freeze()  # what was imported stays: vLLM has both processes collect garbage several times while they start
    return AsyncLLM.from_vllm_config(config, stat_loggers=loggers)


def _openmp_survives_forks(environment: Mapping[str, str]) -> bool:
    """Whether a forked process can start threads: not with GNU's runtime, if threads were started before."""
    return any(name in environment.get("LD_PRELOAD", "") for name in ("libiomp", "libomp"))


def stop_engine(engine: AsyncLLM) -> None:
    """End the engine's processes; safe to call once more, which vLLM does when the interpreter exits."""
    engine.shutdown()
    # The engine calls this again when it is collected, at exit possibly after the modules that it needs.
    engine.shutdown = _already_stopped


def _already_stopped(*_: object, **__: object) -> None:
    return None
