"""Listens to vLLM's per-step statistics in the front-end process."""

import logging
import time
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from scheduler.counters import SpeculationHistory
from scheduler.health import PATIENCE
from scheduler.vllm_types import take_speculation

_log = logging.getLogger(__name__)
_BROKEN = (
    f"the drafter does not work: of the last {PATIENCE} drafts not one token was accepted; decoding goes on without it "
    "and tries it now and then (answers are not affected)"
)
_RECOVERED = "the drafter works again: drafting goes on"


class SpeculationStatLogger(StatLoggerBase):
    """Feeds a ``SpeculationHistory``, and takes our part out of the statistics before vLLM's own loggers see them."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0, history: SpeculationHistory | None = None):
        self._history = history or SpeculationHistory()
        self._drafter_healthy = True

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM for every step with outputs."""
        snapshot = take_speculation(scheduler_stats) if scheduler_stats else None
        if snapshot is None:
            return
        self._history.record(time.monotonic(), snapshot)
        if snapshot.state.drafter_healthy is not self._drafter_healthy:
            self._drafter_healthy = snapshot.state.drafter_healthy
            _log.warning(_RECOVERED if self._drafter_healthy else _BROKEN)

    def log_engine_initialized(self) -> None:
        """Nothing to say: the server prints its own start-up block."""
