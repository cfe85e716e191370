"""vLLM's continuous-batching scheduler, extended to verify only the draft tokens that are worth it."""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from scheduler.adaptive import AdaptivePolicy
from scheduler.options import DrafterOptions, EngineOptions
from scheduler.policy import ComingStep, DraftPolicy, SurvivalFloor
from scheduler.step_watch import StepWatch
from scheduler.vllm_types import DraftingSchedulerOutput, SurvivalDraftTokenIds


class SlipstreamScheduler(Scheduler):
    """Named in ``scheduler_cls``; lives in the engine-core process."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        options = EngineOptions.from_additional_config(dict(self.vllm_config.additional_config))
        self._policy = self._make_policy(options.drafter) if options.drafter else None
        self._watch = StepWatch()
        if self.num_spec_tokens:
            # With a table vLLM does not pad a one-token admission with fake drafts, which would be counted as
            # drafts and sampled under other rules. The table itself changes nothing: one length for every batch.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def _make_policy(self, drafter: DrafterOptions) -> DraftPolicy:
        if drafter.survival_floor is not None:
            return SurvivalFloor(drafter.survival_floor, self.num_spec_tokens)
        return AdaptivePolicy(self.num_spec_tokens, drafter.min_draft_tokens, self.max_num_scheduled_tokens)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's choice of what to run, with what the proposer has to know of it.

        A cache salt keeps a request's text from others, our drafts included.
        """
        self._report_step()
        output = super().schedule(*args, **kwargs)
        if self._policy is None or not output.total_num_scheduled_tokens:
            return output
        new = [request.req_id for request in output.scheduled_new_reqs]
        private = frozenset(request_id for request_id in new if self.requests[request_id].cache_salt)
        coming = self._coming_step()
        lengths = dict(zip(coming.request_ids, self._policy.plan(coming), strict=True))
        scheduled = output.num_scheduled_tokens
        context_tokens = sum(self.requests[request_id].num_computed_tokens for request_id in scheduled)
        self._watch.start(output.total_num_scheduled_tokens, len(scheduled), context_tokens)
        return DraftingSchedulerOutput.of(output, private, lengths)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Trim the drafts, then let vLLM check them against grammars and attach them to their requests."""
        if self._policy is not None and isinstance(draft_token_ids, SurvivalDraftTokenIds):
            self._watch.drafted([len(tokens) for tokens in draft_token_ids.draft_token_ids])
            coming = self._coming_step()
            drafted = dict(zip(draft_token_ids.req_ids, draft_token_ids.survival, strict=True))
            survival = [drafted.get(request_id, []) for request_id in coming.request_ids]
            admitted = dict(zip(coming.request_ids, self._policy.admit(coming, survival), strict=True))
            draft_token_ids.draft_token_ids = [
                tokens[: admitted.get(request_id, 0)]
                for request_id, tokens in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True)
            ]
        super().update_draft_token_ids(draft_token_ids)

    def _coming_step(self) -> ComingStep:
        """The step behind the one that was scheduled last, as far as it is known."""
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        unread = sum(
            request.num_tokens - request.num_computed_tokens for request in self.running if request.is_prefill_chunk
        )
        return ComingStep(
            [request.request_id for request in decoding],
            [request.num_computed_tokens for request in decoding],
            max(min(unread, self.max_num_scheduled_tokens - len(decoding)), 0),
        )

    def _report_step(self) -> None:
        """Tell the policy how long the last step took; only now is it known what was drafted behind it."""
        taken = self._watch.take()
        if taken is not None and self._policy is not None:
            self._policy.step_took(*taken)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's bookkeeping, with speculation counted from what was emitted.

        vLLM counts accepted drafts before it looks for the end of the text, so tokens past it are counted though
        nobody receives them; and it leaves out decode steps for which no draft was worth verifying, which flatters
        the average. Here every decode step of a request counts as one verify step.
        """
        self._watch.stop()
        decoding = {r.request_id for r in self.running if r.num_output_tokens > 0} if self.num_spec_tokens else set()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._policy is not None:
            for request_id in self.finished_req_ids:
                self._policy.finished(request_id)
        if not decoding:
            return outputs
        stats = SpecDecodingStats.new(self.num_spec_tokens)
        for output in outputs.values():
            for request in output.outputs:
                if request.request_id in decoding and request.new_token_ids:
                    drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(request.request_id, ()))
                    accepted = min(len(request.new_token_ids) - 1, drafts)
                    stats.observe_draft(drafts, accepted)
                    if self._policy is not None and not request.finished:
                        self._policy.verified(request.request_id, drafts, accepted)
            if output.scheduler_stats is not None:
                output.scheduler_stats.spec_decoding_stats = stats if stats.num_drafts else None
        return outputs
