"""The asynchronous scheduler alone: no engine here can run it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from drafter.options import ProposalOptions
from scheduler.draft_limit import DRAFT_LIMIT_KEY
from scheduler.engine import EngineShape, engine_arguments
from scheduler.options import DrafterOptions, EngineOptions
from scheduler.policy import Source
from scheduler.vllm_async_scheduler import SlipstreamAsyncScheduler
from server.model_store import resolve_model
from server.settings import Settings

SLOTS = 4


@pytest.fixture(scope="module")
def config() -> Any:
    settings = Settings()
    model = resolve_model(settings.model.source, settings.model.cache_dir)
    shape = EngineShape(str(model), max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64)
    options = EngineOptions(DrafterOptions(Path("nowhere"), ProposalOptions(SLOTS)))
    return AsyncEngineArgs(**engine_arguments(shape, options)).create_engine_config()


@pytest.fixture
def scheduler(config: Any) -> SlipstreamAsyncScheduler:
    spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=8, dtype=torch.float32)
    pages = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    config.cache_config.num_gpu_blocks = 64
    config.cache_config.enable_prefix_caching = False
    return SlipstreamAsyncScheduler(
        vllm_config=config,
        kv_cache_config=pages,
        structured_output_manager=StructuredOutputManager(config),
        block_size=32,
        log_stats=False,
    )


class Pipeline:
    """Runs a scheduler two steps deep, with a made-up model that accepts ``right[request]`` draft tokens at most.

    A step takes 10 ms and 2 ms for each of its tokens.
    """

    def __init__(self, scheduler: SlipstreamAsyncScheduler, right: dict[str, int]):
        self._now = 0.0
        scheduler.clock = lambda: self._now
        self.scheduler, self.right = scheduler, right
        self.placeholders: dict[str, list[int]] = {name: [] for name in right}
        self._flying: list[SchedulerOutput] = []
        for name in right:
            self.add(name)

    def add(self, name: str, **extra: Any) -> None:
        params = SamplingParams(max_tokens=400, ignore_eos=True, extra_args=extra or None)
        self.scheduler.add_request(Request(name, [5, 6, 7], params, None))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            output = self.scheduler.schedule()
            for name, tokens in output.scheduled_spec_decode_tokens.items():
                self.placeholders[name].append(len(tokens))
            self._flying.append(output)
            if len(self._flying) == 2:
                self._finish(self._flying.pop(0))

    def _finish(self, output: SchedulerOutput) -> None:
        names = list(output.num_scheduled_tokens)
        drafts = [len(output.scheduled_spec_decode_tokens.get(name, ())) for name in names]
        sampled = [[9] * (1 + min(count, self.right[name])) for name, count in zip(names, drafts, strict=True)]
        rows = {name: row for row, name in enumerate(names)}
        self._now += 0.010 + 0.002 * output.total_num_scheduled_tokens
        result = ModelRunnerOutput(req_ids=names, req_id_to_index=rows, sampled_token_ids=sampled)
        self.scheduler.update_from_output(output, result)


def test_every_request_has_placeholders_of_its_own(scheduler: SlipstreamAsyncScheduler) -> None:
    pipeline = Pipeline(scheduler, {"good": SLOTS, "bad": 0})
    pipeline.run(60)
    good, bad = (pipeline.placeholders[name][-20:] for name in ("good", "bad"))
    assert sum(good) / max(len(good), 1) > 2
    assert sum(bad) < sum(good) / 2


def test_acceptance_is_learned_from_the_step_it_belongs_to(scheduler: SlipstreamAsyncScheduler) -> None:
    pipeline = Pipeline(scheduler, {"a": 1})
    pipeline.run(150)
    model = scheduler.policy.acceptance[Source.DRAFTER]
    expected = model.expected(["a"], torch.tensor([50]).numpy(), SLOTS)[0]
    assert expected[0] > 0.75 and expected[1] < 0.4


def test_a_request_that_allows_no_drafts_gets_no_placeholders(scheduler: SlipstreamAsyncScheduler) -> None:
    pipeline = Pipeline(scheduler, {})
    pipeline.right, pipeline.placeholders = {"free": SLOTS, "none": SLOTS}, {"free": [], "none": []}
    pipeline.add("free")
    pipeline.add("none", **{DRAFT_LIMIT_KEY: 0})
    pipeline.run(30)
    assert sum(pipeline.placeholders["free"]) > 0 and sum(pipeline.placeholders["none"]) == 0


def test_requests_that_end_are_forgotten(scheduler: SlipstreamAsyncScheduler) -> None:
    pipeline = Pipeline(scheduler, {"a": SLOTS})
    pipeline.run(200)
    assert not scheduler.has_unfinished_requests()
    scheduler.schedule()
    assert "a" not in scheduler.policy.acceptance[Source.DRAFTER]._rows
