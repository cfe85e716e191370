"""Our Prometheus metrics: one table says what there is, what it means and how it is read."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.counters import SourceCounts
from scheduler.policy import Source
from server.speculation_report import SpeculationSource

Sample = tuple[tuple[str, ...], float]  # values of the labels, and the metric's

_NO_SOURCE = "none"


@dataclass(frozen=True, slots=True)
class CounterOrGauge:
    """A metric with one number per combination of labels.

    Attributes:
        name: as it is exposed.
        kind: ``counter`` or ``gauge``.
        labels: names of the labels.
        meaning: one sentence, with the unit.
        read: the samples of now.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    read: Callable[[SpeculationSource], Iterable[Sample]]

    def family(self, speculation: SpeculationSource) -> Metric:
        """The metric as Prometheus's client takes it."""
        make = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = make(self.name, self.meaning, labels=self.labels)
        for labels, value in self.read(speculation):
            family.add_metric(labels, value)
        return family


@dataclass(frozen=True, slots=True)
class DraftLengths:
    """The histogram of verified draft lengths, with a bucket for every length."""

    name: str
    meaning: str
    kind: str = "histogram"
    labels: tuple[str, ...] = ()

    def family(self, speculation: SpeculationSource) -> Metric:
        """The metric as Prometheus's client takes it."""
        counts = speculation.history.latest.counts
        lengths = counts.steps_by_length
        lengths += [0] * (speculation.max_draft_tokens + 1 - len(lengths))
        below = [(str(length), sum(lengths[: length + 1])) for length in range(len(lengths))]
        buckets = [*below, ("+Inf", sum(lengths))]
        return HistogramMetricFamily(self.name, self.meaning, buckets=buckets, sum_value=counts.drafts.verified_tokens)


def _by_source(read: Callable[[SourceCounts], float]) -> Callable[[SpeculationSource], Iterator[Sample]]:
    def samples(speculation: SpeculationSource) -> Iterator[Sample]:
        for source in Source:
            yield (source.name.lower(),), read(speculation.history.latest.counts.sources[source])

    return samples


def _with_undrafted(read: Callable[[SourceCounts], float]) -> Callable[[SpeculationSource], Iterator[Sample]]:
    """Steps without a draft emit one token each: their steps and their tokens are as many."""

    def samples(speculation: SpeculationSource) -> Iterator[Sample]:
        yield from _by_source(read)(speculation)
        yield (_NO_SOURCE,), speculation.history.latest.counts.undrafted_steps

    return samples


def _by_position(read: Callable[[SourceCounts], list[int]]) -> Callable[[SpeculationSource], Iterator[Sample]]:
    def samples(speculation: SpeculationSource) -> Iterator[Sample]:
        for source in Source:
            counts = read(speculation.history.latest.counts.sources[source])
            for position, count in enumerate(counts):
                yield (source.name.lower(), str(position)), count

    return samples


def _alone(read: Callable[[SpeculationSource], float | None]) -> Callable[[SpeculationSource], Iterator[Sample]]:
    """One sample; none while the value is ``None``."""

    def samples(speculation: SpeculationSource) -> Iterator[Sample]:
        value = read(speculation)
        if value is not None:
            yield (), value

    return samples


def _calibration_errors(speculation: SpeculationSource) -> Iterator[Sample]:
    for source in Source:
        error = speculation.history.latest.state.calibration_errors[source]
        if error is not None:
            yield (source.name.lower(),), error


def _healthy(speculation: SpeculationSource) -> float | None:
    return speculation.history.latest.state.drafter_healthy if speculation.drafter is not None else None


_SOURCE, _POSITION = ("source",), ("source", "position")

METRICS: tuple[CounterOrGauge | DraftLengths, ...] = (
    CounterOrGauge(
        "slipstream:verify_steps_total",
        "counter",
        _SOURCE,
        "Decode steps of single requests, by the source of the draft that was verified in them.",
        _with_undrafted(lambda counts: counts.verify_steps),
    ),
    CounterOrGauge(
        "slipstream:drafted_tokens_total",
        "counter",
        _SOURCE,
        "Tokens that were proposed, verified or not.",
        _by_source(lambda counts: counts.drafted_tokens),
    ),
    CounterOrGauge(
        "slipstream:verified_tokens_total",
        "counter",
        _SOURCE,
        "Draft tokens that the target checked.",
        _by_source(lambda counts: counts.verified_tokens),
    ),
    CounterOrGauge(
        "slipstream:accepted_tokens_total",
        "counter",
        _SOURCE,
        "Draft tokens that the target agreed with and that belong to an answer.",
        _by_source(lambda counts: counts.accepted_tokens),
    ),
    CounterOrGauge(
        "slipstream:emitted_tokens_total",
        "counter",
        _SOURCE,
        "Tokens that came out of verify steps: the accepted ones and one of the target's own for each step.",
        _with_undrafted(lambda counts: counts.emitted_tokens),
    ),
    CounterOrGauge(
        "slipstream:verified_tokens_per_position_total",
        "counter",
        _POSITION,
        "Times that a draft position, from 0 on, was verified.",
        _by_position(lambda counts: counts.verified_by_position),
    ),
    CounterOrGauge(
        "slipstream:accepted_tokens_per_position_total",
        "counter",
        _POSITION,
        "Times that a draft position, from 0 on, was accepted, and all before it.",
        _by_position(lambda counts: counts.accepted_by_position),
    ),
    DraftLengths(
        "slipstream:draft_length_tokens",
        "Draft tokens that were verified in a verify step, 0 where there was no draft.",
    ),
    CounterOrGauge(
        "slipstream:expected_accepted_tokens_total",
        "counter",
        _SOURCE,
        "Sum of the draft tokens that were expected to be accepted when they were chosen; without the last step of an "
        "answer, whose end cuts drafts off.",
        _by_source(lambda counts: counts.expected_tokens),
    ),
    CounterOrGauge(
        "slipstream:realised_accepted_tokens_total",
        "counter",
        _SOURCE,
        "Draft tokens that were accepted in the steps that the expectation counts.",
        _by_source(lambda counts: counts.realised_tokens),
    ),
    CounterOrGauge(
        "slipstream:steps_total",
        "counter",
        (),
        "Engine steps that were timed.",
        _alone(lambda speculation: speculation.history.latest.counts.steps),
    ),
    CounterOrGauge(
        "slipstream:measured_step_seconds_total",
        "counter",
        (),
        "Seconds that the timed steps took, drafting included.",
        _alone(lambda speculation: speculation.history.latest.counts.measured_seconds),
    ),
    CounterOrGauge(
        "slipstream:predicted_step_seconds_total",
        "counter",
        (),
        "Seconds that the cost model had predicted for them; 0 without a cost model.",
        _alone(lambda speculation: speculation.history.latest.counts.predicted_seconds),
    ),
    CounterOrGauge(
        "slipstream:step_time_error_ratio",
        "gauge",
        (),
        "Median error of the latest predictions of a step's time, relative to the measured time; absent until known.",
        _alone(lambda speculation: speculation.history.latest.state.step_time_error),
    ),
    CounterOrGauge(
        "slipstream:acceptance_calibration_error_ratio",
        "gauge",
        _SOURCE,
        "Mean distance of predicted from observed acceptance probabilities, 0 to 1; absent until known.",
        _calibration_errors,
    ),
    CounterOrGauge(
        "slipstream:max_draft_tokens",
        "gauge",
        (),
        "Longest draft that the server allows, in tokens; 0 means that drafting is switched off.",
        _alone(lambda speculation: speculation.max_draft_tokens),
    ),
    CounterOrGauge(
        "slipstream:drafting",
        "gauge",
        (),
        "1 while drafts are computed, 0 while they do not pay at the present load, or without a drafter.",
        _alone(lambda speculation: speculation.history.latest.state.drafting),
    ),
    CounterOrGauge(
        "slipstream:drafter_healthy",
        "gauge",
        (),
        "1 if the drafter does its work, 0 if it failed; absent without a drafter.",
        _alone(_healthy),
    ),
)


class SpeculationCollector(Collector):
    """Reads the table when Prometheus asks. Registered where vLLM registers its own metrics, it shares ``/metrics``.

    Args:
        speculation: what is read.
    """

    def __init__(self, speculation: SpeculationSource):
        self._speculation = speculation

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        for metric in METRICS:
            yield metric.family(self._speculation)


def markdown_table() -> str:
    """The table for people."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.meaning} |"
        for metric in METRICS
    ]
    return "\n".join(["| name | type | labels | meaning |", "|---|---|---|---|", *rows])
