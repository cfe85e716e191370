"""Requests that an engine gives itself at its first start, to learn how long its steps take."""

import time
from collections.abc import Callable

from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from scheduler.calibration import CalibrationPolicy

_PREFIX = "slipstream-calibration-"
_PROMPT = [1, 2]
_MOST_SECONDS = 4.0


class Calibration:
    """Runs the phases of a ``CalibrationPolicy``, one after the other.

    The first real request ends it, and so does its time: a machine that is busy otherwise shall not start any later.

    Args:
        scheduler: whose engine is calibrated.
        policy: says what to run, and is the scheduler's policy meanwhile.
        block_size: tokens of a KV block; the requests stay shorter, so that the prefix cache never sees them.
    """

    def __init__(self, scheduler: Scheduler, policy: CalibrationPolicy, block_size: int):
        self.policy = policy
        self._scheduler = scheduler
        self._longest = min(block_size - 1 - len(_PROMPT), policy.steps_per_phase)
        self._left = self._requests = 0
        self._running: set[str] = set()
        self._count = 0
        self._started: float | None = None

    def advance(self, add_request: Callable[[Request], None]) -> bool:
        """Go on, if need be with the next phase; whether there is anything left to do."""
        now = time.monotonic()
        if self._started is None:
            self._started = now
        if now - self._started > _MOST_SECONDS:
            self.stop()
            return False
        if any(request_id in self._scheduler.requests for request_id in self._running):
            return True
        if self._left <= 0:
            self._requests, self._left = self.policy.next_phase(), self.policy.steps_per_phase
        self._running = set()
        if not self._requests:
            return False
        self._left -= self._longest
        for _ in range(self._requests):
            request = self._request()
            self._running.add(request.request_id)
            add_request(request)
        return True

    def stop(self) -> None:
        """Leave it at that."""
        self._scheduler.finish_requests(self._running, RequestStatus.FINISHED_ABORTED)

    def _request(self) -> Request:
        self._count += 1
        params = SamplingParams(temperature=0.0, max_tokens=self._longest, ignore_eos=True)
        return Request(f"{_PREFIX}{self._count}", list(_PROMPT), params, None)
