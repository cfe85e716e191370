"""Draft lengths under vLLM's asynchronous scheduling, where a step is scheduled before its drafts exist.

No engine of this project has run it: on CPUs vLLM switches asynchronous scheduling off. It is tested on the scheduler
alone.
"""

import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput

from scheduler.adaptive import AdaptivePolicy
from scheduler.cost import CostModel, StepLoad
from scheduler.draft_limit import draft_limit
from scheduler.policy import ComingStep


class SlipstreamAsyncScheduler(AsyncScheduler):
    """Gives every request as many placeholders for draft tokens as pay, instead of the same number to all."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.policy = AdaptivePolicy(self.num_spec_tokens, 0, CostModel(self.max_num_scheduled_tokens))
        self.clock = time.perf_counter  # seconds of a monotonic clock
        self._previous: dict[str, int] = {}
        self._finished = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's choice of what to run."""
        output = super().schedule(*args, **kwargs)
        for request_id in output.finished_req_ids:
            self.policy.finished(request_id)
        return output

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Vary the number of placeholders that the next step verifies in place of drafts."""
        super()._update_after_schedule(scheduler_output)
        decoding = [
            request
            for request_id in scheduler_output.num_scheduled_tokens
            if not (request := self.requests[request_id]).is_prefill_chunk
        ]
        coming = ComingStep(
            [request.request_id for request in decoding],
            [request.num_computed_tokens for request in decoding],
            draft_limits=[
                draft_limit((params := request.sampling_params) and params.extra_args, self.num_spec_tokens)
                for request in decoding
            ],
        )
        for request, tokens in zip(decoding, self.policy.reserve(coming), strict=True):
            request.spec_token_ids = [-1] * tokens

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's bookkeeping; the policy learns what was accepted, and how long it took."""
        self._time(scheduler_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for output in outputs.values():
            for request in output.outputs:
                drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(request.request_id, ()))
                if drafts and request.new_token_ids and not request.finished:
                    accepted = min(len(request.new_token_ids) - 1, drafts)
                    context_len = self.requests[request.request_id].num_tokens - len(request.new_token_ids)
                    self.policy.reserved_verified(request.request_id, drafts, accepted, context_len)
        return outputs

    def _time(self, output: SchedulerOutput) -> None:
        """Learn from a step's time: in a pipeline, that is the time between its result and the one before."""
        now, scheduled = self.clock(), output.num_scheduled_tokens
        if self._previous.keys() & scheduled.keys():  # else the engine may have stood idle
            known = [self.requests[name] for name in scheduled if name in self.requests]
            context_tokens = sum(request.num_computed_tokens for request in known)
            # The drafter runs in every step, with blocks of one length for all.
            drafted = output.num_spec_tokens_to_schedule * len(scheduled)
            load = StepLoad(output.total_num_scheduled_tokens, len(scheduled), context_tokens, len(scheduled), drafted)
            self.policy.step_took(load, now - self._finished)
        self._previous, self._finished = scheduled, now
