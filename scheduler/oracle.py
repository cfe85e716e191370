"""The draft lengths of a policy that knows what others have to learn: a bound to compare with, for replays only."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from scheduler.controller import StepCost
from scheduler.cost import StepLoad
from scheduler.policy import Admission, ComingStep, LearningNothing, Offer, Source

Floats = npt.NDArray[np.float64]

_REMEMBERED = 1024  # drafts over which the worth of drafting is averaged
_KEPT = 0.99  # of the emission rate, from step to step


class Oracle(LearningNothing):
    """Admits the draft tokens with which most tokens are emitted per second, knowing the truth and the cost.

    What the truth is, the caller decides: whether each token will be accepted makes a clairvoyant oracle, which no
    policy can match; the probabilities that it will be make the best policy that cannot see the future.

    To emit most tokens in a long time, a step has to be worth its time at the rate of all steps: it maximises its
    tokens less its seconds times that rate (Dinkelbach 1967), not its own tokens per second. Before a draft exists,
    the oracle does not know it either: how long drafts are worth computing, one length for all requests, follows from
    what each length would have been worth in the last steps.

    Args:
        cost: the true cost of steps.
        slots: longest draft.
    """

    def __init__(self, cost: StepCost, slots: int):
        self._cost, self._slots = cost, slots
        self._truth: Floats = np.empty((0, slots))
        self._worths = np.zeros(slots + 1)  # of recent drafts by their length, in tokens
        self._planned = slots
        self._accepted = 0
        self._tokens = self._seconds = 0.0

    def reveal(self, truth: Floats) -> None:
        """Tell the truth about the drafts that the next ``admit`` is about.

        Args:
            truth: ``[requests, slots]`` probability that a token and all before it are accepted, 0 where there is
                none; of the longest drafts, whether they were computed or not. Rows never rise.
        """
        self._truth = truth

    def plan(self, coming: ComingStep) -> list[int]:
        """See ``DraftPolicy``."""
        if self._worths.any():
            self._planned = int(self._worths.argmax())
        return [self._planned] * len(coming.request_ids)

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        """See ``DraftPolicy``."""
        if not offers:
            return []
        sources = [offer.expected for offer in offers]
        offered = [len(offer.survival[source]) for offer, source in zip(offers, sources, strict=True)]
        load = StepLoad(len(offers) + coming.prompt_tokens, len(offers), sum(coming.context_lens), 0, 0)
        self._worths = math.exp(-len(offers) / _REMEMBERED) * self._worths + self._worth(load, sources)
        counts = np.minimum(
            offered, [self._slots if (most := coming.limit(i)) is None else most for i in range(len(offers))]
        )
        known = np.where(np.arange(self._slots) < counts[:, None], self._truth, 0.0)
        rows, slots = np.nonzero(known)
        values = known[rows, slots]
        order = np.argsort(-values, kind="stable")  # equal ones by request and slot, so prefixes stay prefixes
        count, _ = self._best(values[order], load, self._drafting(load, self._planned))
        admitted = np.bincount(rows[order[:count]], minlength=len(offers)).tolist()
        return [
            Admission(tokens, source, row[:tokens].tolist())
            for tokens, source, row in zip(admitted, sources, known, strict=True)
        ]

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        """See ``DraftPolicy``."""
        self._accepted += accepted

    def step_took(self, load: StepLoad, seconds: float) -> None:
        """See ``DraftPolicy``."""
        self._tokens = _KEPT * self._tokens + load.requests + self._accepted
        self._seconds = _KEPT * self._seconds + seconds
        self._accepted = 0

    def _worth(self, load: StepLoad, sources: Sequence[Source]) -> Floats:
        """``[slots + 1]`` what drafts of each length add to the step that is about to be filled, in tokens."""
        repeated = np.array(sources)[:, None] == Source.REPETITION  # such drafts are there without drafting
        numbers = np.where(repeated, -1, np.arange(self._slots)).ravel()
        values = self._truth.ravel()
        order = np.argsort(-values, kind="stable")
        order = order[values[order] > 0]
        values, numbers = values[order], numbers[order]
        without = self._best(values[numbers < 0], load, load)[1]
        worth = np.zeros(self._slots + 1)
        for length in range(1, self._slots + 1):
            worth[length] = self._best(values[numbers < length], load, self._drafting(load, length))[1] - without
        return worth

    def _drafting(self, load: StepLoad, length: int) -> StepLoad:
        requests = load.requests if length else 0
        return replace(load, drafted_requests=requests, drafted_slots=requests * length)

    def _best(self, values: Floats, load: StepLoad, drafting: StepLoad) -> tuple[int, float]:
        """How many of the tokens, likeliest first, a step should verify, and what it is worth in tokens then."""
        seconds = self._cost.seconds_by_tokens(load.tokens + np.arange(len(values) + 1), drafting)
        emitted = load.requests + np.concatenate(([0.0], np.cumsum(values)))
        rate = self._tokens / self._seconds if self._seconds else float((emitted / seconds).max())
        gains = emitted - rate * seconds
        best = int(gains.argmax())
        return best, float(gains[best])
