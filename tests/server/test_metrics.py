"""The table of metrics against what Prometheus is told and what the documentation says."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from scheduler.counters import SpeculationSnapshot, SpeculationState
from server.metrics import METRICS, SpeculationCollector, markdown_table
from server.speculation_report import SpeculationSource
from tests.server.speculation_counts import counted, speculation_source

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def scrape(source: SpeculationSource) -> dict[str, float]:
    """Exposed samples by name and labels."""
    registry = CollectorRegistry()
    registry.register(SpeculationCollector(source))
    lines = generate_latest(registry).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_counters_are_told_by_source() -> None:
    samples = scrape(speculation_source(counted()))
    assert {
        name: samples[f"slipstream:{name}"]
        for name in (
            'verify_steps_total{source="drafter"}',
            'verify_steps_total{source="repetition"}',
            'verify_steps_total{source="none"}',
            'drafted_tokens_total{source="drafter"}',
            'drafted_tokens_total{source="repetition"}',
            'verified_tokens_total{source="drafter"}',
            'verified_tokens_total{source="repetition"}',
            'accepted_tokens_total{source="drafter"}',
            'accepted_tokens_total{source="repetition"}',
            'emitted_tokens_total{source="drafter"}',
            'emitted_tokens_total{source="repetition"}',
            'emitted_tokens_total{source="none"}',
            'expected_accepted_tokens_total{source="drafter"}',
            'realised_accepted_tokens_total{source="drafter"}',
            "steps_total",
            "measured_step_seconds_total",
            "predicted_step_seconds_total",
        )
    } == {
        'verify_steps_total{source="drafter"}': 10,
        'verify_steps_total{source="repetition"}': 4,
        'verify_steps_total{source="none"}': 2,
        'drafted_tokens_total{source="drafter"}': 40,
        'drafted_tokens_total{source="repetition"}': 6,
        'verified_tokens_total{source="drafter"}': 22,
        'verified_tokens_total{source="repetition"}': 6,
        'accepted_tokens_total{source="drafter"}': 10,
        'accepted_tokens_total{source="repetition"}': 5,
        'emitted_tokens_total{source="drafter"}': 20,
        'emitted_tokens_total{source="repetition"}': 9,
        'emitted_tokens_total{source="none"}': 2,
        'expected_accepted_tokens_total{source="drafter"}': 9.5,
        'realised_accepted_tokens_total{source="drafter"}': 8,
        "steps_total": 12,
        "measured_step_seconds_total": 1.5,
        "predicted_step_seconds_total": 1.25,
    }


def test_positions_are_divided_by_the_times_that_they_were_verified() -> None:
    samples = scrape(speculation_source(counted()))
    for kind, expected in {"verified": [10, 8, 4], "accepted": [6, 3, 1]}.items():
        name = f"slipstream:{kind}_tokens_per_position_total"
        assert [samples[f'{name}{{position="{i}",source="drafter"}}'] for i in range(3)] == expected


def test_the_histogram_has_a_bucket_for_every_length() -> None:
    samples = scrape(speculation_source(counted(), slots=4))
    name = "slipstream:draft_length_tokens"
    assert [samples[f'{name}_bucket{{le="{i}"}}'] for i in (0, 1, 2, 3, 4, "+Inf")] == [2, 7, 11, 16, 16, 16]
    assert (samples[f"{name}_count"], samples[f"{name}_sum"]) == (16, 28)


def test_gauges_tell_the_state_of_now() -> None:
    samples = scrape(speculation_source(counted()))
    assert samples["slipstream:step_time_error_ratio"] == 0.0625
    assert samples['slipstream:acceptance_calibration_error_ratio{source="drafter"}'] == 0.03125
    assert 'slipstream:acceptance_calibration_error_ratio{source="repetition"}' not in samples
    assert samples["slipstream:max_draft_tokens"] == 3
    assert (samples["slipstream:drafting"], samples["slipstream:drafter_healthy"]) == (1, 1)
    broken = scrape(speculation_source(SpeculationSnapshot(counted().counts, SpeculationState(False, False))))
    assert (broken["slipstream:drafting"], broken["slipstream:drafter_healthy"]) == (0, 0)
    assert "slipstream:step_time_error_ratio" not in broken


@pytest.mark.parametrize("drafter", ["tiny", None])
def test_everything_can_be_asked_for_before_the_first_step(drafter: str | None) -> None:
    samples = scrape(speculation_source(drafter=drafter))
    assert samples['slipstream:verified_tokens_total{source="drafter"}'] == 0
    assert samples["slipstream:max_draft_tokens"] == (3 if drafter else 0)
    assert ("slipstream:drafter_healthy" in samples) == (drafter is not None)


def test_every_metric_is_exposed_under_its_name_with_its_labels_and_unlike_vllms() -> None:
    samples = scrape(speculation_source(counted()))
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    exposed = set()
    for metric in METRICS:
        labels = {"le"} if metric.kind == "histogram" else set(metric.labels)
        name = f"{metric.name}_bucket" if metric.kind == "histogram" else metric.name
        own = [sample for sample in samples if sample.partition("{")[0] == name]
        assert own and all(set(re.findall(r'(\w+)="', sample)) == labels for sample in own)
        assert metric.name.startswith("slipstream:") and metric.name.endswith("_total") == (metric.kind == "counter")
        exposed.update(own)
    others = {sample for sample in samples if not re.search(r"_(sum|count|created)$", sample)} - exposed
    assert others == set()


def test_the_documentation_holds_the_table() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    documented = re.search(r"<!-- metrics:begin -->\n(.*)\n<!-- metrics:end -->", text, re.DOTALL)
    assert documented is not None and documented[1] == markdown_table(), f"write markdown_table() into {DOCUMENTATION}"


def test_the_documentation_names_no_metric_that_is_not_there() -> None:
    known = {name for metric in METRICS for name in (metric.name, f"{metric.name}_bucket")}
    assert set(re.findall(r"slipstream:\w+", DOCUMENTATION.read_text(encoding="utf-8"))) <= known
