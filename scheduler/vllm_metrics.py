"""Listens to vLLM's per-step statistics in the front-end process."""

import time
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from scheduler.counters import SpeculationHistory


class SpeculationStatLogger(StatLoggerBase):
    """Feeds a ``SpeculationHistory`` with what each engine step verified and accepted."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0, history: SpeculationHistory | None = None):
        self._history = history or SpeculationHistory()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM for every step with outputs."""
        stats = scheduler_stats.spec_decoding_stats if scheduler_stats else None
        if stats is not None:
            self._history.add(
                time.monotonic(), stats.num_drafts, stats.num_draft_tokens_per_pos, stats.num_accepted_tokens_per_pos
            )

    def log_engine_initialized(self) -> None:
        """Nothing to say: the server prints its own start-up block."""
