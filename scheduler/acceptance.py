"""How likely draft tokens are to be accepted, learnt while serving; numpy only, no engine needed.

A drafter's own probabilities are miscalibrated: it knows neither the target nor the text at hand. DSpark
(arXiv 2607.05147) verifies by survival, the probability that a draft token and all before it are accepted, and
calibrates a trained confidence head offline, position by position. DiffuSpec (arXiv 2510.02358) sets the length of the
next draft from moving averages of a request's accepted lengths. ``AcceptanceModel`` does both in one regression that
is learnt online: the target's verdicts calibrate the drafter's probabilities, position by position and in the light of
the request's own history, and without probabilities position and history decide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_LEAST = 1e-3  # confidences are clipped here and at 1 minus it; a drafter that is surer than that has no proof of it
_USUAL_CONTEXT = 1024  # where the context length has no say

# What is believed before any label, as means and standard deviations of log odds. Positions share most of their
# deviation, so that what the first slots teach holds for the deep ones, which are seldom reached.
_SHARED_DEVIATION, _POSITION_DEVIATION, _POSITION_REACH = 1.0, 0.5, 3.0
_SLOPE, _CONTEXT = (1.0, 0.5), (0.0, 0.3)
_BASE_LOG_ODDS = math.log(0.7 / 0.3)
_OFFSET_VARIANCE, _LEAST_OFFSET_VARIANCE, _MOST_OFFSET_VARIANCE = 0.5, 0.02, 4.0

# How fast that is forgotten, in labels, and how labels that contradict the predictions hasten it.
_MEMORY, _REQUEST_MEMORY = 20_000.0, 300.0
_SURPRISE_WINDOW, _USUAL_SURPRISE, _SURPRISE_GAIN, _MOST_HASTE = 50.0, 4.0, 20.0, 1_000.0
_OFFSET_SHARE = 1 / 20  # of one finished request in the variance of offsets

_ITERATIONS, _LONGEST_STEP, _SETTLED = 6, 2.0, 0.3  # of Newton's method; lengths in log odds
_BATCH = 256  # observations that are learnt from at once, at most
_PATIENCE, _YOUNG = 8, 100  # steps between lessons; and observations, up to which every prediction learns
_WINDOW, _BINS = 2_000, 10  # of the reliability diagram


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Slots whose predicted acceptance lay in ``[lower, upper)``; the last bin includes 1.

    Attributes:
        lower: of the predictions, 0 to 1.
        upper: of the predictions, 0 to 1.
        labels: slots whose outcome is known.
        predicted: their mean predicted probability.
        accepted: the share of them that was accepted.
    """

    lower: float
    upper: float
    labels: int
    predicted: float
    accepted: float


class AcceptanceModel:
    """Calibrated survival of draft tokens, learnt from what the target accepts.

    The probability ``q`` that the target accepts slot ``k``, given that it accepted the slots before, follows::

        logit q = position[k] + slope * logit(confidence) + context * log(context_len / 1024) + offset[request]

    It starts at the drafter's own probabilities (slope 1, the rest 0). A second regression of the same form, with base
    rates instead of the confidence, speaks for slots without one and for drafts that do not exist yet. It has offsets
    of its own: a request that is easy because its confidences are high has none in the first and a large one here.

    Labels are the accepted slots and the first rejected one. What lies behind a rejection, or was never verified, has
    no label. Which slots are verified may well depend on their confidences, so base rates of verified slots alone
    would be too high; there, and only there, the calibrated confidence stands in for the outcome of a slot that
    could have been reached but was not verified.

    Observations are kept and learnt in one go every eighth step, see ``learn``: that takes longer than a prediction.
    One model serves one drafter and target; it is not safe for use by several threads.

    Args:
        slots: draft tokens of the longest block.
        requests: whose history is kept at the same time; beyond that, the one unheard of for longest is forgotten.

    Raises:
        ValueError: either is below 1.
    """

    def __init__(self, slots: int, requests: int = 4096):
        for name, value in (("slots", slots), ("requests", requests)):
            if value < 1:
                raise ValueError(f"{name} is {value}; at least 1 is needed")
        self._slots = slots
        self._calibration = _MixedRegression(slots, 0.0, (_SLOPE, _CONTEXT), requests)
        self._base_rates = _MixedRegression(slots, _BASE_LOG_ODDS, (_CONTEXT,), requests)
        self._rows: dict[str, int] = {}  # the request heard of last stands last
        self._free = list(range(requests - 1, -1, -1))
        self._population = requests  # the row of those without a history
        self._batch = _Batch(slots)
        self._observations, self._steps = 0, 0  # since the start, and since the last lesson
        self._predicted, self._accepted = np.empty(0), np.empty(0)

    def survival(
        self,
        request_ids: Sequence[str],
        confidences: npt.NDArray[np.floating],
        counts: npt.NDArray[np.integer],
        context_lens: npt.NDArray[np.integer],
    ) -> Floats:
        """Probability that all of a request's draft tokens up to each slot are accepted.

        Args:
            request_ids: R requests; unknown ones are predicted as the population.
            confidences: ``[R, S]`` with S at most ``slots``: the drafter's probability of each draft token given that
                those before it are accepted; NaN where it gives none.
            counts: ``[R]`` draft tokens of each request; what stands behind them in ``confidences`` is ignored.
            context_lens: ``[R]`` tokens before the draft.

        Returns:
            ``[R, S]`` float64, never rising along a row, 0 from ``counts`` on.

        Raises:
            ValueError: the shapes do not fit.
        """
        width = confidences.shape[-1]
        if confidences.shape != (len(request_ids), width) or width > self._slots:
            raise ValueError(
                f"confidences have shape {confidences.shape}; "
                f"[{len(request_ids)} requests, at most {self._slots} slots] was expected"
            )
        _check_per_request("counts", counts, len(request_ids))
        _check_per_request("context_lens", context_lens, len(request_ids))
        self._steps += 1
        if self._observations < _YOUNG or self._steps >= _PATIENCE or self._batch.is_long(_PATIENCE):
            self.learn()
        drafted = np.arange(width)[:, None] < counts
        by_slot = np.ascontiguousarray(confidences.T, dtype=np.float64)
        return self._survival(self._rows_of(request_ids), by_slot, drafted, _context(context_lens)).T

    def expected(self, request_ids: Sequence[str], context_lens: npt.NDArray[np.integer], length: int) -> Floats:
        """Survival to expect of drafts that do not exist yet, from the history of the requests and of all.

        Args:
            request_ids: R requests; unknown ones are predicted as the population.
            context_lens: ``[R]`` tokens before the draft.
            length: draft tokens, 0 to ``slots``.

        Returns:
            ``[R, length]`` float64, never rising along a row.

        Raises:
            ValueError: the shapes do not fit, or the length is out of range.
        """
        if not 0 <= length <= self._slots:
            raise ValueError(f"length is {length}; 0 to {self._slots} was expected")
        _check_per_request("context_lens", context_lens, len(request_ids))
        self.learn()
        rows = self._rows_of(request_ids)
        return _survival(*self._base_rates.log_odds((_context(context_lens),), rows, length)).T

    def skip(self) -> None:
        """Count a step that predicts nothing: what is seldom tried is learnt from as soon as it is tried again."""
        self._steps += 1

    def observe(
        self,
        request_id: str,
        confidences: npt.NDArray[np.floating],
        verified: int,
        accepted: int,
        context_len: int,
    ) -> None:
        """Note how a draft fared.

        Args:
            request_id: its request, which is known from now on.
            confidences: ``[drafted]`` of all its draft tokens, as for ``survival``.
            verified: draft tokens that the target saw, the first ones.
            accepted: draft tokens that it accepted.
            context_len: tokens before the draft.

        Raises:
            ValueError: not 0 <= accepted <= verified <= drafted <= slots.
        """
        if not 0 <= accepted <= verified <= len(confidences) <= self._slots:
            raise ValueError(
                f"{accepted} accepted of {verified} verified of {len(confidences)} drafted tokens; each must be at "
                f"most the next, and the last at most {self._slots}"
            )
        if self._batch.size == _BATCH:
            self.learn()
        row = self._admit(request_id)
        self._observations += 1
        self._batch.add(confidences, (row, len(confidences), verified, accepted, context_len))

    def finished(self, request_id: str) -> None:
        """Forget a request's history, after learning from it; unknown requests are ignored."""
        row = self._rows.pop(request_id, None)
        if row is None:
            return
        if row in self._batch.members:
            self.learn()
        for regression in (self._calibration, self._base_rates):
            regression.release(row)
        self._free.append(row)

    def learn(self) -> None:
        """Take in what was observed.

        A caller that has time to spare between observing and predicting, while the device computes, can spend it here.
        """
        self._steps = 0
        if not self._batch.size:
            return
        confidences, numbers = self._batch.confidences, self._batch.numbers
        self._batch = _Batch(self._slots)
        rows, drafted, verified, accepted, context_lens = numbers
        context, slot = _context(context_lens), np.arange(self._slots)[:, None]
        survival = self._survival(rows, confidences, slot < drafted, context)
        before = np.vstack([np.ones(len(rows)), survival[:-1]])
        conditional = np.divide(survival, before, out=np.zeros_like(survival), where=before > 0)
        labelled = slot < np.minimum(accepted + 1, verified)
        self._note(conditional[labelled], (slot < accepted)[labelled])

        known = ~np.isnan(confidences)
        # Slots behind a wholly accepted verification would have been reached if those between had been accepted.
        unverified = (accepted == verified) & (slot >= verified) & (slot < drafted)
        assumed = unverified & np.logical_and.accumulate(known | ~unverified)
        reach = np.cumprod(np.where(assumed, conditional, 1.0), axis=0)
        reach = np.where(assumed, np.vstack([np.ones(len(rows)), reach[:-1]]), labelled)
        outcomes = np.where(assumed, conditional, slot < accepted)
        self._base_rates.learn((context,), outcomes, reach, rows)
        calibrated = labelled & known
        features = (_log_odds(np.where(calibrated, confidences, 0.5)), context)
        self._calibration.learn(features, outcomes, calibrated.astype(np.float64), rows)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error over the latest labels, 0 to 1: how far predictions lie from outcomes on average.

        The predictions are those of single slots from just before their labels came. Chance alone makes for about
        0.02 with a full window. 0 before the first label.
        """
        bins = self.reliability()
        labels = sum(bin_.labels for bin_ in bins)
        return sum(bin_.labels * abs(bin_.predicted - bin_.accepted) for bin_ in bins) / max(labels, 1)

    def reliability(self) -> list[ReliabilityBin]:
        """Predictions against outcomes over about the latest 2,000 labels, by ascending prediction; no empty bins."""
        self.learn()
        number = np.minimum((self._predicted * _BINS).astype(np.int64), _BINS - 1)
        return [
            ReliabilityBin(
                lower=index / _BINS,
                upper=(index + 1) / _BINS,
                labels=int((number == index).sum()),
                predicted=float(self._predicted[number == index].mean()),
                accepted=float(self._accepted[number == index].mean()),
            )
            for index in np.unique(number).tolist()
        ]

    def _survival(self, rows: Integers, confidences: Floats, drafted: Flags, context: Floats) -> Floats:
        """``[S, R]``, 0 where not drafted, of confidences ``[S, R]``, drafted ``[S, R]`` and context ``[1, R]``."""
        width = len(confidences)
        log_odds, deviations = self._calibration.log_odds((_log_odds(confidences), context), rows, width)
        if np.isnan(log_odds.sum()):
            missing = np.isnan(log_odds)
            base_log_odds, base_deviations = self._base_rates.log_odds((context,), rows, width)
            log_odds = np.where(missing, base_log_odds, log_odds)
            deviations = np.where(missing, base_deviations, deviations)
        return _survival(np.where(drafted, log_odds, -np.inf), deviations)

    def _rows_of(self, request_ids: Sequence[str]) -> Integers:
        rows = map(self._rows.get, request_ids, repeat(self._population))
        return np.fromiter(rows, dtype=np.int64, count=len(request_ids))

    def _admit(self, request_id: str) -> int:
        """The row of a request, which counts as heard of just now."""
        row = self._rows.pop(request_id, None)
        if row is None:
            if not self._free:
                self.finished(next(iter(self._rows)))
            row = self._free.pop()
        self._rows[request_id] = row
        return row

    def _note(self, predicted: Floats, accepted: Flags) -> None:
        """Remember the predictions and outcomes of slots for the reliability diagram."""
        self._predicted = np.concatenate([self._predicted, predicted])[-_WINDOW:]
        self._accepted = np.concatenate([self._accepted, accepted])[-_WINDOW:]


class _Batch:
    """Observations that wait to be learnt from."""

    def __init__(self, slots: int):
        self.size = 0
        self.members: set[int] = set()
        self._confidences = np.full((_BATCH, slots), np.nan)
        self._numbers = np.zeros((_BATCH, 5), dtype=np.int64)

    def add(self, confidences: npt.NDArray[np.floating], numbers: tuple[int, int, int, int, int]) -> None:
        """Keep a draft's ``[drafted]`` confidences, and its row, drafted, verified, accepted, context length."""
        self._confidences[self.size, : len(confidences)] = confidences
        self._numbers[self.size] = numbers
        self.members.add(numbers[0])
        self.size += 1

    def is_long(self, each: int) -> bool:
        """Whether there are on average ``each`` drafts of a request."""
        return self.size >= each * len(self.members) > 0

    @property
    def confidences(self) -> Floats:
        """``[slots, size]``."""
        return np.ascontiguousarray(self._confidences[: self.size].T)

    @property
    def numbers(self) -> Integers:
        """``[5, size]``."""
        return self._numbers[: self.size].T


class _MixedRegression:
    """Logistic regression with an intercept per slot, weights of features, and an offset per request.

    A Bayesian filter: the coefficients are jointly normal and wander about their prior (an Ornstein-Uhlenbeck
    process), the offset of each request about 0. A batch of labels moves both to the maximum of their posterior
    (Laplace's approximation, Newton's method with the offsets eliminated), so the length of a step follows from what
    is known: long at first, bounded by the prior, and falling to a floor that forgetting sets. Unlike gradient
    descent this needs no learning rate for a slope, a base rate and a request that are known to different degrees.
    The variance of offsets, which shrinks them towards the population, is estimated from the requests that finished.

    Args:
        slots: intercepts.
        intercept: prior mean of all of them.
        features: prior mean and standard deviation of each feature's weight.
        rows: requests; one row more stands for the population and never learns.
    """

    def __init__(self, slots: int, intercept: float, features: Sequence[tuple[float, float]], rows: int):
        self._slots = slots
        self._prior_mean = np.array([intercept] * slots + [mean for mean, _ in features])
        distance = np.abs(np.subtract.outer(np.arange(slots), np.arange(slots)))
        self._prior = np.diag([0.0] * slots + [deviation**2 for _, deviation in features])
        self._prior[:slots, :slots] = _SHARED_DEVIATION**2
        self._prior[:slots, :slots] += _POSITION_DEVIATION**2 * np.exp(-distance / _POSITION_REACH)
        self._mean, self._covariance = self._prior_mean.copy(), self._prior.copy()
        self._offset_variance = _OFFSET_VARIANCE
        self._offsets, self._variances = np.zeros(rows + 1), np.full(rows + 1, _OFFSET_VARIANCE)
        self._residual, self._information = 0.0, 0.0  # of the latest labels

    def log_odds(self, features: Sequence[Floats], rows: Integers, slots: int) -> tuple[Floats, Floats]:
        """``[slots, R]`` means, and the ``[1, R]`` standard deviations of the offsets in them."""
        means = self._sum(self._mean, self._offsets[rows], features, slots)
        return means, np.sqrt(self._variances[rows])[None]

    def release(self, row: int) -> None:
        """End a request: its offset tells how much requests differ, and its row goes back to the population."""
        moment = self._offsets[row] ** 2 + self._variances[row]
        variance = self._offset_variance + _OFFSET_SHARE * (moment - self._offset_variance)
        self._offset_variance = min(max(variance, _LEAST_OFFSET_VARIANCE), _MOST_OFFSET_VARIANCE)
        self._offsets[row], self._variances[row] = 0.0, self._offset_variance
        self._variances[-1] = self._offset_variance

    def learn(self, features: Sequence[Floats], outcomes: Floats, weights: Floats, rows: Integers) -> None:
        """Take in the labels of N drafts.

        Args:
            features: each ``[slots, N]`` or ``[1, N]``.
            outcomes: ``[slots, N]``, 1 for accepted; shares of 1 count as such.
            weights: ``[slots, N]``, 0 where there is no label.
            rows: ``[N]``, whose drafts they are.
        """
        drafts = rows
        rows, of_draft = np.unique(drafts, return_inverse=True)
        requests = (np.arange(len(rows)) == of_draft[:, None]).astype(np.float64)  # [N, R], whose draft is which
        labels = weights.sum(axis=0) @ requests
        total = float(labels.sum())
        if not total:
            return
        features = [np.broadcast_to(feature, weights.shape) for feature in features]
        probability = _probability(self._sum(self._mean, self._offsets[drafts], features, self._slots))
        haste = self._haste(probability, outcomes, weights)
        mean, covariance = self._drifted(total * haste / _MEMORY)
        kept = np.exp(-labels / _REQUEST_MEMORY)
        offset_means = kept * self._offsets[rows]
        offset_variances = self._offset_variance + kept**2 * (self._variances[rows] - self._offset_variance)
        offset_variances /= haste**0.25  # a sudden change is more likely everybody's than this request's alone
        precision = np.linalg.inv(covariance)

        coefficients, offsets = mean.copy(), offset_means.copy()
        for _ in range(_ITERATIONS):
            probability = _probability(self._sum(coefficients, offsets[of_draft], features, self._slots))
            residual = weights * (outcomes - probability)
            curvature, shared = self._curvature(weights * probability * (1 - probability), features)
            shared = shared @ requests
            own = shared[: self._slots].sum(axis=0) + 1 / offset_variances
            pull = residual.sum(axis=0) @ requests + (offset_means - offsets) / offset_variances
            slope = np.concatenate([residual.sum(axis=1), [np.vdot(residual, feature) for feature in features]])
            slope += precision @ (mean - coefficients)
            eliminated = shared / own
            covariance = np.linalg.inv(precision + curvature - eliminated @ shared.T)
            step = covariance @ (slope - eliminated @ pull)
            offset_step = (pull - shared.T @ step) / own
            moved = np.abs(self._sum(step, offset_step[of_draft], features, self._slots) * (weights > 0)).max()
            scale = min(1.0, _LONGEST_STEP / max(moved, _LONGEST_STEP))
            coefficients += scale * step
            offsets += scale * offset_step
            if moved < _SETTLED:
                break
        self._mean, self._covariance = coefficients, (covariance + covariance.T) / 2
        self._offsets[rows] = offsets
        self._variances[rows] = 1 / own + ((self._covariance @ eliminated) * eliminated).sum(axis=0)

    def _sum(self, coefficients: Floats, offsets: Floats, features: Sequence[Floats], slots: int) -> Floats:
        """The linear predictor, ``[slots, R]``."""
        total: Floats = coefficients[:slots, None] + offsets
        for weight, feature in zip(coefficients[self._slots :], features, strict=True):
            total += weight * feature
        return total

    def _curvature(self, information: Floats, features: Sequence[Floats]) -> tuple[Floats, Floats]:
        """Second derivatives of the loss, ``[coefficients, coefficients]`` and ``[coefficients, N]`` with offsets."""
        first = self._slots
        curvature = np.zeros((len(self._mean), len(self._mean)))
        curvature[range(first), range(first)] = information.sum(axis=1)
        by_feature = [information * feature for feature in features]
        for i, product in enumerate(by_feature, start=first):
            curvature[i, :first] = curvature[:first, i] = product.sum(axis=1)
            curvature[i, first:] = [np.vdot(product, feature) for feature in features]
        return curvature, np.vstack([information, *(product.sum(axis=0) for product in by_feature)])

    def _haste(self, probability: Floats, outcomes: Floats, weights: Floats) -> float:
        """How many times faster than usual to forget: 1, and more while the latest labels contradict predictions.

        Surprise is the squared sum of recent residuals over its variance: about 1 as long as the predictions hold. A
        filter without it follows a collapse either too late or, in calm times, every whim.
        """
        kept = math.exp(-float(weights.sum()) / _SURPRISE_WINDOW)
        self._residual = kept * self._residual + float(np.vdot(weights, outcomes - probability))
        self._information = kept * self._information + float(np.vdot(weights, probability * (1 - probability)))
        surprise = self._residual**2 / (self._information + 1)
        return min(1 + _SURPRISE_GAIN * max(0.0, surprise - _USUAL_SURPRISE), _MOST_HASTE)

    def _drifted(self, elapsed: float) -> tuple[Floats, Floats]:
        """Mean and covariance of the coefficients after ``elapsed`` memory lengths."""
        kept = math.exp(-elapsed)
        mean = self._prior_mean + kept * (self._mean - self._prior_mean)
        return mean, self._prior + kept**2 * (self._covariance - self._prior)


def _survival(log_odds: Floats, deviations: Floats) -> Floats:
    """``[S, R]`` probability of accepting all slots down to each, averaged over the requests' uncertain offsets.

    The average is taken over whole blocks: a request that had its first slots accepted is likely an easy one, so the
    slots of a block depend on each other as long as the request is little known. Two points, one deviation to either
    side, stand for the normal distribution (Gauss-Hermite quadrature); a third changes nothing that could be measured.
    """
    against, spread = np.exp(-log_odds), np.exp(deviations)
    block = np.empty((len(log_odds), 2, log_odds.shape[1]))  # odds against, conditional, then joint probabilities
    np.multiply(against, spread, out=block[:, 0])
    np.divide(against, spread, out=block[:, 1])
    block += 1
    np.reciprocal(block, out=block)
    block[:1] *= 0.5
    for slot in range(1, len(block)):
        block[slot] *= block[slot - 1]
    return np.add(block[:, 0], block[:, 1])


def _probability(log_odds: Floats) -> Floats:
    return 1 / (1 + np.exp(-log_odds))


def _log_odds(probabilities: Floats) -> Floats:
    clipped = np.clip(probabilities, _LEAST, 1 - _LEAST)
    return np.log(clipped / (1 - clipped))


def _context(context_lens: npt.NDArray[np.integer]) -> Floats:
    """``[1, R]``, the feature that stands for the context length."""
    return np.log(np.maximum(context_lens, 1) / _USUAL_CONTEXT)[None]


def _check_per_request(name: str, values: npt.NDArray[np.integer], requests: int) -> None:
    if values.shape != (requests,):
        raise ValueError(f"{name} have shape {values.shape}; [{requests} requests] was expected")
