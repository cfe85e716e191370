"""vLLM's continuous-batching scheduler, extended to verify only the draft tokens that are worth it."""

import time
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from scheduler.adaptive import AdaptivePolicy
from scheduler.calibration import CalibrationPolicy
from scheduler.draft_limit import draft_limit
from scheduler.health import HealthGuard
from scheduler.ledger import SpeculationLedger
from scheduler.options import DrafterOptions, EngineOptions
from scheduler.policies import keep_costs, make_policy
from scheduler.policy import ComingStep, DraftPolicy, Offer, Source
from scheduler.recording import SOURCES, RecordingPolicy
from scheduler.repetition import NO_REPETITION, GrowingText, Repetition, RepetitionDrafts
from scheduler.step_watch import StepWatch
from scheduler.trace import TraceHeader, TraceWriter
from scheduler.vllm_calibration import Calibration
from scheduler.vllm_repetition import NgramMatcher
from scheduler.vllm_types import DraftingSchedulerOutput, SurvivalDraftTokenIds, attach_speculation

_STEPS_BETWEEN_SAVES = 4096
_SECONDS_BETWEEN_REPORTS = 0.1  # each takes some tenths of a millisecond, in two processes


class SlipstreamScheduler(Scheduler):
    """Named in ``scheduler_cls``; lives in the engine-core process."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        options = EngineOptions.from_additional_config(dict(self.vllm_config.additional_config))
        drafter, self._reports = options.drafter, options.statistics
        self._policy: DraftPolicy | None = None
        self._repetition: RepetitionDrafts | None = None
        self._calibration: Calibration | None = None
        self._ledger = SpeculationLedger(self.num_spec_tokens)
        self._unreported = SpecDecodingStats.new(self.num_spec_tokens)
        self._next_report = 0.0
        self._watch = StepWatch()
        self._steps = 0
        if drafter:
            self._options = drafter.policy
            policy = make_policy(self._options, self.num_spec_tokens, self.max_num_scheduled_tokens)
            self._unguarded, self._guard = policy, HealthGuard(policy, self.num_spec_tokens)
            self._policy = self._recording(drafter, policy) or self._guard
            matcher = NgramMatcher() if self._options.repetition else None
            self._repetition = RepetitionDrafts(matcher) if matcher else None
            self._calibrate(policy, matcher)
        if self.num_spec_tokens:
            # With a table vLLM does not pad a one-token admission with fake drafts, which would be counted as
            # drafts and sampled under other rules. The table itself changes nothing: one length for every batch.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def _recording(self, drafter: DrafterOptions, policy: DraftPolicy) -> RecordingPolicy | None:
        """The policy with a trace of what it does, if there is to be one; nothing must come between the two."""
        if self._options.trace_file is None:
            return None
        target = Path(self.vllm_config.model_config.model).name
        header = TraceHeader(self.num_spec_tokens, SOURCES, target, drafter.checkpoint.name, self._options.name)
        return RecordingPolicy(policy, TraceWriter(self._options.trace_file, header), time.monotonic)

    def _calibrate(self, policy: DraftPolicy, matcher: NgramMatcher | None) -> None:
        """Begin to learn step times where none are known; what runs in the background would be measured with them."""
        if self._options.calibrate and isinstance(policy, AdaptivePolicy) and not policy.cost.observations:
            if matcher is not None:
                matcher.wait()
            exploring = CalibrationPolicy(policy.cost, self.num_spec_tokens, self.max_num_running_reqs)
            self._calibration = Calibration(self, exploring, self.block_size)
            self._calibration.advance(super().add_request)

    @property
    def _present_policy(self) -> DraftPolicy | None:
        return self._policy if self._calibration is None else self._calibration.policy

    def add_request(self, request: Request) -> None:
        """Take in a request; nobody waits for a calibration."""
        if self._calibration is not None:
            self._calibration.stop()
            self._calibration = None
        super().add_request(request)

    def shutdown(self) -> None:
        """Keep what was learned, then let vLLM clean up."""
        self._keep_costs()
        if isinstance(self._policy, RecordingPolicy):
            self._policy.close()
        super().shutdown()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's choice of what to run, with what the proposer has to know of it.

        A cache salt keeps a request's text from others, our drafts included.
        """
        self._report_step()
        if self._calibration is not None and not self._calibration.advance(super().add_request):
            self._calibration = None
            self._keep_costs()
        policy = self._present_policy
        output = super().schedule(*args, **kwargs)
        for request_id in output.finished_req_ids:  # every one passes here once, aborted ones too
            self._forget(request_id)
        if policy is None or not output.total_num_scheduled_tokens:
            return output
        new = [request.req_id for request in output.scheduled_new_reqs]
        private = frozenset(request_id for request_id in new if self.requests[request_id].cache_salt)
        coming = self._coming_step()
        lengths = dict(zip(coming.request_ids, policy.plan(coming), strict=True))
        if self._calibration is None:
            self._ledger.planned(list(lengths.values()))
        scheduled = output.num_scheduled_tokens
        context_tokens = sum(self.requests[request_id].num_computed_tokens for request_id in scheduled)
        self._watch.start(output.total_num_scheduled_tokens, len(scheduled), context_tokens)
        return DraftingSchedulerOutput.of(output, private, lengths)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Choose among the drafts and trim them; vLLM checks them against grammars and attaches them to requests."""
        policy = self._present_policy
        if policy is not None and isinstance(draft_token_ids, SurvivalDraftTokenIds):
            lengths = [len(tokens) for tokens in draft_token_ids.draft_token_ids]
            self._watch.drafted(lengths, draft_token_ids.late_seconds)
            draft_token_ids = self._chosen(policy, draft_token_ids)
        super().update_draft_token_ids(draft_token_ids)

    def _chosen(self, policy: DraftPolicy, drafted: SurvivalDraftTokenIds) -> DraftTokenIds:
        """The draft tokens that the coming step verifies, of all requests that decode in it."""
        coming = self._coming_step()
        repetitions = self._repetitions(coming)
        rows = {request_id: row for row, request_id in enumerate(drafted.req_ids)}
        sources: list[tuple[list[int], list[int]]] = []
        offers: list[Offer] = []
        for request_id, limit in zip(coming.request_ids, coming.draft_limits, strict=True):
            row = rows.get(request_id)
            tokens, survival = ([], []) if row is None else (drafted.draft_token_ids[row], drafted.survival[row])
            repetition = repetitions.get(request_id, NO_REPETITION)
            sources.append((tokens, repetition.token_ids))
            offers.append(Offer((survival[:limit], repetition.survival)))
        admissions = policy.admit(coming, offers)
        if self._calibration is None:
            self._ledger.drafted(Source.DRAFTER, sum(map(len, drafted.draft_token_ids)))
            self._ledger.drafted(Source.REPETITION, sum(len(each.token_ids) for each in repetitions.values()))
            for request_id, admission in zip(coming.request_ids, admissions, strict=True):
                self._ledger.admitted(request_id, admission.source, admission.tokens, admission.survival)
        chosen = {
            request_id: tokens[admission.source][: admission.tokens]
            for request_id, tokens, admission in zip(coming.request_ids, sources, admissions, strict=True)
        }
        return DraftTokenIds(list(chosen), list(chosen.values()))

    def _repetitions(self, coming: ComingStep) -> dict[str, Repetition]:
        if self._repetition is None or self._calibration is not None:
            return {}
        return self._repetition.drafts(
            [
                GrowingText(request_id, self.requests[request_id].all_token_ids, limit)
                for request_id, limit in zip(coming.request_ids, coming.draft_limits, strict=True)
            ]
        )

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
            [self._draft_limit(request) for request in decoding],
        )

    def _draft_limit(self, request: Request) -> int:
        """Draft tokens that can still be emitted: a step emits one token more than it accepts."""
        room = min(request.max_tokens - request.num_output_tokens, self.max_model_len - request.num_tokens) - 1
        params = request.sampling_params
        return max(min(room, draft_limit(params and params.extra_args, self.num_spec_tokens)), 0)

    def _report_step(self) -> None:
        """Tell the policy how long the last step took; only now is it known what was drafted behind it."""
        taken, policy = self._watch.take(), self._present_policy
        if taken is None or policy is None:
            return
        load, seconds = taken
        predicted = policy.predicted_seconds(load)
        policy.step_took(load, seconds)
        if self._calibration is not None:
            return
        self._ledger.step_took(seconds, predicted)
        if self._ledger.judgement_due:
            errors = policy.errors()
            self._ledger.judged(errors.step_time, errors.calibration)
        self._steps += 1
        if self._steps % _STEPS_BETWEEN_SAVES == 0:
            self._keep_costs()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's bookkeeping, with speculation counted from what was emitted.

        vLLM counts accepted drafts before it looks for the end of the text, so tokens past it are counted though
        nobody receives them; and it leaves out decode steps for which no draft was worth verifying, which flatters
        the average. Here every decode step of a request counts as one verify step.
        """
        self._watch.stop()
        decoding = {request.request_id for request in self.running if request.num_output_tokens > 0}
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._calibration is not None:
            return {}
        if self._policy is None:
            return outputs
        for output in outputs.values():
            for request in output.outputs:
                if request.request_id in decoding and request.new_token_ids:
                    drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(request.request_id, ()))
                    accepted = min(len(request.new_token_ids) - 1, drafts)
                    self._unreported.observe_draft(drafts, accepted)
                    self._note(self._policy, request.request_id, drafts, accepted, request.finished)
            if output.scheduler_stats is not None:
                self._report(output.scheduler_stats)
        return outputs

    def _report(self, stats: SchedulerStats) -> None:
        """Let statistics carry what was counted to the front end: now and then, and when nothing is left to do."""
        stats.spec_decoding_stats = None
        now = time.monotonic()
        if now < self._next_report and self.has_unfinished_requests():
            return
        self._next_report = now + _SECONDS_BETWEEN_REPORTS
        if self._unreported.num_drafts:
            stats.spec_decoding_stats = self._unreported
            self._unreported = SpecDecodingStats.new(self.num_spec_tokens)
        if self._reports:
            attach_speculation(stats, self._ledger.snapshot())

    def _note(self, policy: DraftPolicy, request_id: str, drafts: int, accepted: int, ended: bool) -> None:
        """A request verified ``drafts`` tokens; where its answer ended, how many are right is not known."""
        self._ledger.verified(request_id, drafts, accepted, ended)
        if not ended:
            policy.verified(request_id, drafts, accepted)
            if self._repetition is not None:
                self._repetition.verified(request_id, accepted)
            self._ledger.drafter_works(self._guard.health.is_healthy)

    def _keep_costs(self) -> None:
        if self._policy is not None:
            keep_costs(self._options, self._unguarded)

    def _forget(self, request_id: str) -> None:
        self._ledger.finished(request_id)
        if self._policy is not None:
            self._policy.finished(request_id)
        if self._repetition is not None:
            self._repetition.finished(request_id)
