"""vLLM's continuous-batching scheduler, extended to verify only the draft tokens that are worth it."""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from scheduler.options import EngineOptions
from scheduler.policy import SurvivalFloor
from scheduler.vllm_types import PrivacySchedulerOutput, SurvivalDraftTokenIds


class SlipstreamScheduler(Scheduler):
    """Named in ``scheduler_cls``; lives in the engine-core process."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        options = EngineOptions.from_additional_config(dict(self.vllm_config.additional_config))
        self._policy = SurvivalFloor(options.drafter.survival_floor if options.drafter else 0.0)
        if self.num_spec_tokens:
            # With a table vLLM does not pad a one-token admission with fake drafts, which would be counted as
            # drafts and sampled under other rules. The table itself changes nothing: one length for every batch.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's choice of what to run; a cache salt keeps a request's text from others, our drafts included."""
        output = super().schedule(*args, **kwargs)
        new = [request.req_id for request in output.scheduled_new_reqs]
        private = frozenset(request_id for request_id in new if self.requests[request_id].cache_salt)
        return PrivacySchedulerOutput.of(output, private) if private else output

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Trim the drafts, then let vLLM check them against grammars and attach them to their requests."""
        if isinstance(draft_token_ids, SurvivalDraftTokenIds):
            admitted = self._policy.admit(draft_token_ids.survival)
            draft_token_ids.draft_token_ids = [
                tokens[:count] for tokens, count in zip(draft_token_ids.draft_token_ids, admitted, strict=True)
            ]
        super().update_draft_token_ids(draft_token_ids)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's bookkeeping, with speculation counted from what was emitted.

        vLLM counts accepted drafts before it looks for the end of the text, so tokens past it are counted though
        nobody receives them; and it leaves out decode steps for which no draft was worth verifying, which flatters
        the average. Here every decode step of a request counts as one verify step.
        """
        decoding = {r.request_id for r in self.running if r.num_output_tokens > 0} if self.num_spec_tokens else set()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not decoding:
            return outputs
        stats = SpecDecodingStats.new(self.num_spec_tokens)
        for output in outputs.values():
            for request in output.outputs:
                if request.request_id in decoding and request.new_token_ids:
                    drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(request.request_id, ()))
                    stats.observe_draft(drafts, min(len(request.new_token_ids) - 1, drafts))
            if output.scheduler_stats is not None:
                output.scheduler_stats.spec_decoding_stats = stats if stats.num_drafts else None
        return outputs
