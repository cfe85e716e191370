"""How long an engine step takes, learned from the steps themselves; pure, no engine needed.

A step's time is modelled as a common speed times a sum of non-negative terms: a piecewise linear curve over the rows
of the target's forward pass, and a price for each request, context token, pair of row and context token, and for the
drafter. A Kalman filter (Kalman 1960) keeps the terms and the speed. Three things are unlike its textbook form: errors
are relative, large ones count for less (Huber 1964), and the terms are projected onto the non-negative ones, in the
filter's own metric (Simon and Chia 2002).
"""

import json
import math
import os
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]

SCHEMA = 2

# The prior, as parts of the time of a lone row without context or draft: (mean, standard deviation).
_BASE = (1.0, 1.0)
_PER_ROW = (0.05, 0.1)
_TERMS = {
    "request": (0.01, 0.05),
    "context_token": (1e-5, 5e-5),
    "row_and_context_token": (1e-5, 5e-5),
    "drafter": (0.3, 0.3),
    "drafted_request": (0.05, 0.1),
    "drafted_slot": (0.01, 0.02),
}
_EACH_ROW = 16  # rows, up to which every number of them has a knot
_BEND = 1.0  # standard deviation of the change of slope when rows double, in those of a slope
_LEAST_BASE = 1e-3  # keeps every prediction positive
_FIRST_SECONDS = 0.01  # a lone row, before the first observation
_MOST_TOKENS = 1 << 30
_FAR = float(1 << 40)  # a knot that no step reaches: past the last one the last slope goes on

_NOISE = 0.1  # relative standard deviation of a step's time
_HUBER = 1.5  # errors beyond this many standard deviations count for less
_LARGEST_SURPRISE = 1.0  # natural logarithm: no single step moves a prediction further
_CAUTION = 0.25  # part of a prediction's own variance that is added to the noise
_DRIFT = 0.001  # relative standard deviation of a term's drift in one step
_DRIFT_FLOOR = 0.05  # a term at nought drifts like one of this many prior deviations
_SPEED_DRIFT = 0.005
_SPEED_VARIANCE = 0.2**2  # of the logarithm: before the first step, and at most

_START = 8  # first observations, read again from the prior as a whole with each
_SPEED_WINDOW = 24  # steps
_SPEED_CHANGE = 0.25  # natural logarithm: smaller changes are followed by the filter alone
_ERROR_WINDOW = 200

_LARGEST_LOGARITHM = 30.0  # of a saved speed or term
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one engine step computes.

    Attributes:
        tokens: rows of the target's forward pass: prompt chunks, one per decoding request, and draft tokens.
        requests: requests in the step.
        context_tokens: tokens in the KV cache of those requests, summed over them.
        drafted_requests: blocks the drafter computes at the end of the step; 0 if it does not run.
        drafted_slots: slots of these blocks, summed over them.

    Raises:
        ValueError: a count is negative.
    """

    tokens: int
    requests: int
    context_tokens: int
    drafted_requests: int
    drafted_slots: int

    def __post_init__(self) -> None:
        if min(self.tokens, self.requests, self.context_tokens, self.drafted_requests, self.drafted_slots) < 0:
            raise ValueError(f"the counts of a step's load must not be negative: {self}")

    @property
    def mean_context(self) -> float:
        """Context tokens per request; 0 without requests."""
        return self.context_tokens / max(self.requests, 1)


class CostModel:
    """Predicts the time of engine steps and learns from each one. Not safe for use by several threads at once.

    A change of speed that all loads share, as when the processor's clock changes, moves every prediction at once; a
    step far slower than predicted hardly moves any.

    Args:
        max_tokens: the most rows of a step that are likely; for more, the curve goes on with its last slope.

    Raises:
        ValueError: ``max_tokens`` is not positive, or beyond 2^30.
    """

    def __init__(self, max_tokens: int):
        if not 1 <= max_tokens <= _MOST_TOKENS:
            raise ValueError(f"max_tokens must be from 1 to {_MOST_TOKENS}, not {max_tokens}")
        self.max_tokens = max_tokens
        self._knots = _knots(max_tokens)
        widths = np.diff(self._knots)
        self._widths = widths
        self._ramp_ends = np.append(np.ones(len(widths) - 1), np.inf)  # the last ramp goes on past its knot
        self._unit, self._prior_terms, self._prior_covariance = _prior(self._knots)
        self._least = np.zeros(len(self._unit))
        self._least[0] = _LEAST_BASE
        self._observations = 0
        self._first: list[tuple[_Floats, float]] | None = []  # inputs and logarithms of seconds; None once started
        # Of steps whose loads were well known: the surprise at the time, inputs, and logarithms of seconds.
        self._recent: deque[tuple[float, _Floats, float]] = deque(maxlen=_SPEED_WINDOW)
        self._errors: deque[float] = deque(maxlen=_ERROR_WINDOW)
        self._restart(math.log(_FIRST_SECONDS))

    def _restart(self, log_speed: float) -> None:
        self._terms = self._prior_terms.copy()
        self._log_speed = log_speed
        self._covariance = self._prior_covariance.copy()  # of the terms, in units of their priors, and of log_speed

    @property
    def observations(self) -> int:
        """Steps learned from."""
        return self._observations

    @property
    def error(self) -> float:
        """Median relative error of the last predictions, each made just before its step; NaN before the first."""
        return median(self._errors) if self._errors else math.nan

    def seconds(self, load: StepLoad) -> float:
        """Predicted time of a step in seconds, above 0."""
        return float(self.seconds_by_tokens(np.array([load.tokens]), load)[0])

    def seconds_by_tokens(self, tokens: NDArray[np.integer[Any]], rest: StepLoad) -> _Floats:
        """Predicted times of steps that differ in their rows only.

        Args:
            tokens: ``[n]`` rows of the forward pass, in any order.
            rest: everything else about the steps; its ``tokens`` are ignored.

        Returns:
            ``[n]`` float64 seconds, above 0; more rows never take less time.
        """
        terms = self._terms * self._unit
        curve, others = terms[: len(self._knots)], terms[len(self._knots) :]
        request, context, row_and_context, drafter, drafted_request, drafted_slot = others.tolist()
        values = np.empty(len(self._knots) + 1)
        np.cumsum(curve, out=values[:-1])
        values[:-1] += self._knots * (row_and_context * rest.mean_context) + (
            request * rest.requests
            + context * rest.context_tokens
            + drafter * (rest.drafted_requests > 0)
            + drafted_request * rest.drafted_requests
            + drafted_slot * rest.drafted_slots
        )
        last = self._knots[-1]
        values[-1] = values[-2] + (values[-2] - values[-3]) / (last - self._knots[-2]) * (_FAR - last)
        return np.interp(tokens, np.append(self._knots, _FAR), values * math.exp(self._log_speed))

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step.

        Args:
            load: what the step computed.
            seconds: how long it took.

        Raises:
            ValueError: ``seconds`` is not a positive, finite number.
        """
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"the time of a step must be positive and finite, not {seconds}")
        inputs, log_seconds = self._inputs(load), math.log(seconds)
        surprise = self._surprise(inputs, log_seconds)
        if self._observations:
            self._errors.append(abs(math.expm1(-surprise)))
        self._observations += 1
        if self._first is not None:
            self._first.append((inputs, log_seconds))
            self._start(self._first)
        elif self._update(inputs, log_seconds) < _NOISE**2:
            self._recent.append((surprise, inputs, log_seconds))
            self._follow_speed()

    def _surprise(self, inputs: _Floats, log_seconds: float) -> float:
        """Logarithm of a step's time over its prediction."""
        return log_seconds - self._log_speed - math.log(inputs @ self._terms)

    def _inputs(self, load: StepLoad) -> _Floats:
        """What each term is multiplied with, in units of the terms' priors."""
        rows = max(load.tokens, 1)
        ramps = np.clip((rows - self._knots[:-1]) / self._widths, 0, self._ramp_ends)
        others = (
            load.requests,
            load.context_tokens,
            rows * load.mean_context,
            load.drafted_requests > 0,
            load.drafted_requests,
            load.drafted_slots,
        )
        return np.concatenate(((1.0,), ramps, others)) * self._unit

    def _start(self, first: list[tuple[_Floats, float]]) -> None:
        """Takes the speed from the median of all observations so far, as any one of them may be an outlier."""
        self._restart(median(log - math.log(row @ self._prior_terms) for row, log in first))
        for row, log in first:
            self._update(row, log)
        if len(first) == _START:
            self._first = None

    def _update(self, inputs: _Floats, log_seconds: float) -> float:
        """One step of the filter; returns the prediction's relative variance before it."""
        self._drift()
        relative = float(inputs @ self._terms)
        surprise = self._surprise(inputs, log_seconds)
        direction = np.append(inputs / relative, 1.0)
        shared = self._covariance @ direction
        variance = float(direction @ shared)
        noise = max(_NOISE**2, _CAUTION * variance)
        bound = min(_HUBER * math.sqrt(variance + noise), _LARGEST_SURPRISE)
        believed = max(-bound, min(bound, surprise))
        trust = believed / surprise if surprise else 1.0
        # The noise is relative to the true time, of which the larger of prediction and observation is the safe guess.
        whole = variance + noise * max(1.0, math.exp(2 * believed))
        self._covariance -= (trust / whole) * np.outer(shared, shared)
        # In logarithms for the speed, in proportion for the terms, so that neither overshoots below nought.
        self._terms = self._terms + shared[:-1] * (math.expm1(believed) / whole)
        self._log_speed += float(shared[-1]) * believed / whole
        self._project()
        return variance

    def _drift(self) -> None:
        """Lets the truth wander, so that learning never stops, but not past the prior for what is never seen."""
        deviations = np.append(_DRIFT * (self._terms + _DRIFT_FLOOR), _SPEED_DRIFT)
        self._covariance.flat[:: len(deviations) + 1] += deviations**2
        excess = np.diagonal(self._covariance) / np.diagonal(self._prior_covariance)
        if excess.max() > 1:
            shrink = 1 / np.sqrt(np.maximum(excess, 1))
            self._covariance *= np.outer(shrink, shrink)

    def _project(self) -> None:
        """Moves the terms to non-negative ones: what the data say of sums of terms stays as true as possible."""
        if (self._terms >= self._least).all():
            return
        free = np.append(self._terms, self._log_speed)
        held: list[int] = []
        while True:
            short = self._least - self._terms
            short[held] = 0
            worst = int(short.argmax())
            if short[worst] <= 0:
                break
            held.append(worst)
            columns = self._covariance[:, held]
            moved = free + columns @ np.linalg.solve(columns[held], self._least[held] - free[held])
            self._terms, self._log_speed = moved[:-1], float(moved[-1])
            self._terms[held] = self._least[held]

    def _follow_speed(self) -> None:
        """Moves the speed by the median error of recent steps, where that is more than the filter would follow."""
        if len(self._recent) < _SPEED_WINDOW or abs(median(step[0] for step in self._recent)) < _SPEED_CHANGE:
            return
        # Most of the window shows the new speed, so its newer half does; what the filter has followed is done.
        newer = list(self._recent)[_SPEED_WINDOW // 2 :]
        self._log_speed += median(self._surprise(inputs, log_seconds) for _, inputs, log_seconds in newer)
        self._recent.clear()

    def to_json(self) -> dict[str, Any]:
        """What was learned, as plain JSON values; ``error`` and the steps it comes from are not among it."""
        return {
            "max_tokens": self.max_tokens,
            "observations": self._observations,
            "log_speed": self._log_speed,
            "terms": self._terms.tolist(),
            "covariance": self._covariance.tolist(),
        }

    @classmethod
    def from_json(cls, saved: object) -> "CostModel":
        """The model that ``to_json`` gave.

        Raises:
            ValueError: it is not such a value, or not one that learning can lead to.
        """
        if not isinstance(saved, dict):
            raise ValueError(f"a cost model must be a JSON object, not {type(saved).__name__}")
        model = cls(_count(saved, "max_tokens"))
        size = len(model._terms)
        model._observations = _count(saved, "observations")
        model._log_speed = float(_array(saved, "log_speed", ()))
        model._terms = _array(saved, "terms", (size,))
        model._covariance = _array(saved, "covariance", (size + 1, size + 1))
        model._first = None
        model._check()
        return model

    def _check(self) -> None:
        if abs(self._log_speed) > _LARGEST_LOGARITHM:
            raise ValueError(f"log_speed must lie within {_LARGEST_LOGARITHM} of 0, not be {self._log_speed}")
        if (self._terms < self._least).any() or self._terms.max() > math.exp(_LARGEST_LOGARITHM):
            raise ValueError(f"terms must be positive and at most e^{_LARGEST_LOGARITHM}, not {self._terms.tolist()}")
        if (self._covariance != self._covariance.T).any():
            raise ValueError("covariance is not symmetric")
        variances, most = np.diagonal(self._covariance), np.diagonal(self._prior_covariance)
        if (variances <= 0).any() or (variances > most * (1 + _ROUNDING)).any():
            raise ValueError(f"variances must lie above 0 and not above the prior's, {most.tolist()}; not {variances}")
        if np.linalg.eigvalsh(self._covariance)[0] < -_ROUNDING:
            raise ValueError("covariance is not positive semidefinite")


def calibration_loads(
    max_tokens: int, max_requests: int, *, block_slots: int = 8, context: int = 1024
) -> list[StepLoad]:
    """Loads that tell the terms of the model apart, for a calibration at start.

    Repeat each a few times, and stop where the time for calibration is spent: the cheapest come first.

    Args:
        max_tokens: the most rows of a step.
        max_requests: the most requests of a step.
        block_slots: slots of a drafted block; 0 if nothing is drafted.
        context: context tokens of each request in the loads with a long context.

    Returns:
        Distinct loads, in the order of their expected time.

    Raises:
        ValueError: ``max_tokens`` or ``max_requests`` is not positive, or another count is negative.
    """
    if min(max_tokens, max_requests) < 1 or min(block_slots, context) < 0:
        raise ValueError(
            "a calibration needs a positive max_tokens and max_requests, and no negative block_slots or context, "
            f"not {max_tokens}, {max_requests}, {block_slots} and {context}"
        )
    loads = [StepLoad(rows, 1, rows, 0, 0) for rows in _powers(max_tokens)]
    for requests in _powers(min(max_tokens, max_requests)):
        verified = min(requests * (1 + block_slots), max_tokens)
        short, long = verified, max(requests * context, verified)
        loads += [StepLoad(requests, requests, cached, 0, 0) for cached in (short, long)]
        if block_slots:
            slots, fewer = requests * block_slots, requests * (block_slots - block_slots // 2)
            loads += [StepLoad(requests, requests, short, requests, drafted) for drafted in (slots, fewer)]
            loads.append(StepLoad(verified, requests, long, requests, slots))
    prior = CostModel(max_tokens)
    return sorted(dict.fromkeys(loads), key=prior.seconds)


def save_cost_model(path: Path, identity: str, model: CostModel) -> None:
    """Writes a model to a file in one step: readers see the old file or the new one, never half of one.

    Args:
        path: the file; its folder is made if it is missing.
        identity: what the times depend on: target, drafter, number format, processor, threads, kernels, `max_tokens`.
        model: what to save.

    Raises:
        OSError: the file cannot be written; an old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {"schema": SCHEMA, "identity": identity, "model": model.to_json()}
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            json.dump(plain, file, allow_nan=False)
        os.replace(temporary, path)
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def load_cost_model(path: Path, identity: str) -> tuple[CostModel | None, str]:
    """Reads a model that ``save_cost_model`` wrote with the same identity.

    Returns:
        The model and a sentence for the log; None and the reason if there is no model that can be trusted.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"no step times are saved in {path}"
    except OSError as error:
        return None, f"the step times in {path} cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return None, f"the step times in {path} are not JSON: {error}"
    if not isinstance(saved, dict) or saved.get("schema") != SCHEMA:
        return None, f"the step times in {path} are not of schema {SCHEMA}"
    if saved.get("identity") != identity:
        return None, f"the step times in {path} are of {saved.get('identity')!r}, not of {identity!r}"
    try:
        model = CostModel.from_json(saved.get("model"))
    except ValueError as error:
        return None, f"the step times in {path} are not usable: {error}"
    return model, f"step times learned from {model.observations} steps are read from {path}"


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``."""
    return [1 << k for k in range((most - 1).bit_length())] + [most]


def _knots(max_tokens: int) -> _Floats:
    """Every number of rows up to 16, as kernels work in blocks of a few rows and one row more can cost a block; then
    two for each doubling, and ``max_tokens``, not so close to the one before that their slope is mostly noise."""
    last = max(max_tokens, 2)
    doublings = [knot for power in _powers(last) if power >= _EACH_ROW for knot in (power, power + power // 2)]
    knots = [*range(1, _EACH_ROW), *doublings]
    return np.array([knot for knot in knots if knot * 1.25 <= last or knot < min(last, _EACH_ROW)] + [last], float)


def _prior(knots: _Floats) -> tuple[_Floats, _Floats, _Floats]:
    """Units of the terms, their prior means in these units, and the covariance of terms and speed."""
    starts, widths = knots[:-1], np.diff(knots)
    mean, deviation = np.array([_BASE] + [_PER_ROW] * len(widths) + list(_TERMS.values())).T
    unit = deviation.copy()
    unit[1 : len(widths) + 1] *= widths
    covariance = np.eye(len(unit) + 1)
    # Slopes are a random walk, so that the best guess beyond the last knot with data is the last slope.
    doublings = np.log2(starts)
    covariance[1 : len(widths) + 1, 1 : len(widths) + 1] += _BEND**2 * np.minimum.outer(doublings, doublings)
    covariance[-1, -1] = _SPEED_VARIANCE
    return unit, mean / deviation, covariance


def _count(saved: Mapping[str, object], name: str) -> int:
    value = saved.get(name)
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    return value


def _array(saved: Mapping[str, object], name: str, shape: tuple[int, ...]) -> _Floats:
    try:
        array = np.array(saved.get(name), dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} is not made of numbers: {error}") from error
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be finite numbers of shape {shape}, not {np.isfinite(array).sum()} such of {array.shape}"
        )
    return array
