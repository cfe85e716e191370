import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.cost import CostModel, StepLoad, calibration_loads, load_cost_model, save_cost_model

Truth = Callable[[StepLoad], float]  # seconds
Mix = Callable[[np.random.Generator], StepLoad]


def cpu_like(load: StepLoad) -> float:
    """A 135M model on two cores: memory-bound for a few rows, then bound by arithmetic; long contexts are dear."""
    rows = np.interp(load.tokens, (1, 2, 4, 6, 8, 16, 64, 256, 512), (10, 11, 13.5, 18, 20, 38, 110, 380, 740))
    context = 0.3e-3 * load.tokens * load.mean_context
    drafter = 3 + 1.2 * load.drafted_requests if load.drafted_requests else 0
    return 1e-3 * (3 + float(rows) + context + drafter)


def gpu_like(load: StepLoad) -> float:
    """Flat up to hundreds of rows, then a step every 128 rows."""
    rows = max(8.0, 2 + 1.47 * math.ceil(load.tokens / 128))
    context = 2e-7 * load.tokens * load.mean_context + 1e-6 * load.context_tokens
    drafter = 1.2 + 0.004 * load.drafted_slots if load.drafted_requests else 0
    return 1e-3 * (0.5 + rows + context + 0.01 * load.requests + drafter)


def serving(requests: tuple[int, int], context: int, prompts: float = 0.0, chunk: int = 256) -> Mix:
    """Steps that verify drafts of up to seven tokens; some steps also read a prompt chunk, and some draft nothing."""

    def step(rng: np.random.Generator) -> StepLoad:
        decoding = int(rng.integers(requests[0], requests[1] + 1))
        drafting = decoding if rng.random() > 0.05 else 0
        rows = decoding + int(rng.integers(0, 8, drafting).sum())
        cached = int(decoding * context * rng.uniform(0.7, 1.3))
        prompt = int(rng.integers(8, chunk + 1)) if rng.random() < prompts else 0
        return StepLoad(rows + prompt, decoding + (prompt > 0), cached + prompt, drafting, drafting * 7)

    return step


# Truth, most rows, most requests, and mixes of loads served one after the other.
CPU = (cpu_like, 512, 32, (serving((1, 2), 400), serving((8, 24), 800, 0.1), serving((3, 6), 4000, 0.02)))
GPU = (
    gpu_like,
    8192,
    256,
    (serving((2, 6), 800, 0.02, 512), serving((96, 200), 1500, 0.1, 2048), serving((20, 40), 8000, 0.05, 1024)),
)
MACHINES = pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
Machine = tuple[Truth, int, int, tuple[Mix, ...]]


def measured(rng: np.random.Generator, seconds: float, outliers: float = 0.05) -> float:
    slow = rng.uniform(3, 20) if rng.random() < outliers else 1.0
    return float(seconds * rng.lognormal(0, 0.1) * slow)


def serve(model: CostModel, rng: np.random.Generator, truth: Truth, mix: Mix, steps: int) -> None:
    for _ in range(steps):
        load = mix(rng)
        model.observe(load, measured(rng, truth(load)))


def error(model: CostModel, truth: Truth, mix: Mix) -> float:
    """Median relative error of predictions for loads of a mix."""
    rng = np.random.default_rng(99)
    return median(abs(model.seconds(load) / truth(load) - 1) for load in (mix(rng) for _ in range(200)))


def calibrated(rng: np.random.Generator, machine: Machine) -> CostModel:
    truth, rows, requests, _ = machine
    model = CostModel(rows)
    for load in calibration_loads(rows, requests, block_slots=7):
        for _ in range(3):
            model.observe(load, measured(rng, truth(load)))
    return model


def settled(rng: np.random.Generator, machine: Machine) -> CostModel:
    """A model that has served the first two mixes."""
    model = calibrated(rng, machine)
    for mix in machine[3][:2]:
        serve(model, rng, machine[0], mix, 300)
    return model


def slower(truth: Truth, factor: float) -> Truth:
    return lambda load: factor * truth(load)


def plain(rows: int, context: int = 0) -> StepLoad:
    return StepLoad(rows, 1, context, 0, 0)


# Learning


@MACHINES
@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_few_hundred_noisy_steps_of_a_mix_tell_its_times(machine: Machine, calibrate: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, rows, _, mixes = machine
    model = calibrated(rng, machine) if calibrate else CostModel(rows)
    for mix in mixes:
        serve(model, rng, truth, mix, 300)
        assert error(model, truth, mix) < 0.05
    assert all(error(model, truth, mix) < 0.15 for mix in mixes)  # earlier mixes are not forgotten


@MACHINES
def test_calibration_alone_tells_times_of_loads_it_did_not_run(machine: Machine) -> None:
    errors = []
    for seed in range(5):
        model = calibrated(np.random.default_rng(seed), machine)
        errors += [error(model, machine[0], mix) for mix in machine[3]]
    assert median(errors) < 0.06
    assert max(errors) < 0.2


def test_times_without_noise_are_learned_exactly_where_the_truth_is_linear() -> None:
    def truth(load: StepLoad) -> float:
        rows = 2e-2 + 1e-3 * load.tokens + 1e-7 * load.tokens * load.mean_context + 2e-6 * load.context_tokens
        return rows + 1e-4 * load.requests + 5e-3 * (load.drafted_requests > 0) + 1e-3 * load.drafted_requests

    model, loads = CostModel(256), calibration_loads(256, 16, block_slots=7)
    for _ in range(50):
        for load in loads:
            model.observe(load, truth(load))
    assert max(abs(model.seconds(load) / truth(load) - 1) for load in loads) < 0.01
    apart = StepLoad(100, 10, 5000, 3, 12)
    assert model.seconds(apart) == pytest.approx(truth(apart), rel=0.02)


@MACHINES
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_lasting_change_of_speed_is_followed_for_all_loads_from_steps_of_some(
    machine: Machine, factor: float
) -> None:
    truth, _, _, mixes = machine
    changed = slower(truth, factor)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        model = settled(rng, machine)
        serve(model, rng, changed, mixes[1], 25)
        assert error(model, changed, mixes[1]) < 0.08
        assert error(model, changed, mixes[0]) < 0.12


def test_a_slow_change_of_speed_is_followed_for_all_loads() -> None:
    rng = np.random.default_rng(0)
    model = settled(rng, CPU)
    for k in range(400):
        load = CPU[3][0](rng)
        model.observe(load, measured(rng, cpu_like(load) * (1 + 0.5 * k / 400)))
    assert error(model, slower(cpu_like, 1.5), CPU[3][1]) < 0.1


def test_a_change_that_only_some_loads_share_is_told_from_a_change_of_speed() -> None:
    rng = np.random.default_rng(0)
    model = settled(rng, CPU)
    small, large = CPU[3][:2]
    for _ in range(10):
        serve(model, rng, cpu_like, small, 50)
        serve(model, rng, slower(cpu_like, 2), large, 50)
    assert error(model, cpu_like, small) < 0.1
    assert error(model, slower(cpu_like, 2), large) < 0.05


@MACHINES
def test_one_step_twenty_times_slower_hardly_moves_anything(machine: Machine) -> None:
    truth, _, _, mixes = machine
    for seed in range(3):
        rng = np.random.default_rng(seed)
        model = settled(rng, machine)
        loads = [mixes[1](rng) for _ in range(50)]
        before = [model.seconds(load) for load in loads]
        model.observe(loads[0], 20 * truth(loads[0]))
        moves = [model.seconds(load) / then - 1 for load, then in zip(loads, before, strict=True)]
        assert median(moves) < 0.02
        assert max(moves) < 0.05


def test_a_burst_of_slow_steps_is_not_a_change_of_speed() -> None:
    rng = np.random.default_rng(0)
    model = settled(rng, CPU)
    serve(model, rng, slower(cpu_like, 3), CPU[3][1], 9)
    assert error(model, cpu_like, CPU[3][1]) < 0.15


def test_a_first_step_twenty_times_slower_is_soon_forgotten() -> None:
    rng = np.random.default_rng(0)
    model, mix = CostModel(512), CPU[3][0]
    load = mix(rng)
    model.observe(load, 20 * cpu_like(load))
    for _ in range(4):
        load = mix(rng)
        model.observe(load, measured(rng, cpu_like(load), outliers=0))
    assert error(model, cpu_like, mix) < 0.25


def test_loads_that_are_new_are_learned_in_few_steps_after_thousands_of_others() -> None:
    rng = np.random.default_rng(0)
    model = calibrated(rng, CPU)
    serve(model, rng, cpu_like, CPU[3][0], 6000)
    assert error(model, cpu_like, CPU[3][0]) < 0.05
    serve(model, rng, cpu_like, CPU[3][1], 40)
    assert error(model, cpu_like, CPU[3][1]) < 0.08
    CostModel.from_json(model.to_json())  # variances are still within the prior's


# Where there are no data


def test_before_any_step_predictions_are_plausible() -> None:
    model = CostModel(512)
    assert model.observations == 0
    assert math.isnan(model.error)
    assert 0.001 < model.seconds(plain(1)) < 0.1
    assert model.seconds(plain(1)) < model.seconds(plain(64)) < model.seconds(plain(512)) < 10
    assert model.seconds(plain(8)) < model.seconds(StepLoad(8, 1, 0, 1, 7))


@pytest.mark.parametrize(("slope", "tolerance"), [(2e-3, 0.1), (0.5e-3, 0.15)])
def test_the_last_slope_goes_on_beyond_the_last_knot_with_data(slope: float, tolerance: float) -> None:
    model = CostModel(512)
    for _ in range(30):
        for rows in (1, 2, 4, 8, 16):
            model.observe(plain(rows), 10e-3 + slope * rows)
    for rows in (24, 64, 512, 4096):
        assert model.seconds(plain(rows)) == pytest.approx(10e-3 + slope * rows, rel=tolerance)


def test_a_block_of_rows_more_is_seen_at_the_row_that_needs_it() -> None:
    """Kernels work in blocks of rows: with eight in a block the ninth costs a block, those behind it hardly more."""

    def blocks(load: StepLoad) -> float:
        return 1e-3 * (10 + 4 * (math.ceil(load.tokens / 8) - 1) + 0.2 * load.tokens)

    rng, model = np.random.default_rng(0), CostModel(512)
    serve(model, rng, blocks, lambda rng: StepLoad(int(rng.integers(1, 17)), 4, 400, 0, 0), 600)
    ninth, tenth = (
        model.seconds(StepLoad(rows + 1, 4, 400, 0, 0)) - model.seconds(StepLoad(rows, 4, 400, 0, 0)) for rows in (8, 9)
    )
    assert ninth > 2.5e-3
    assert tenth < 1e-3


def test_a_gap_between_knots_with_data_is_filled_from_both_sides() -> None:
    model = CostModel(512)
    for _ in range(30):
        for rows in (1, 2, 4, 256, 512):
            model.observe(plain(rows), 10e-3 + 1e-3 * rows)
    for rows in (8, 16, 64, 128):
        assert model.seconds(plain(rows)) == pytest.approx(10e-3 + 1e-3 * rows, rel=0.15)


def test_below_the_first_knot_with_data_no_time_exceeds_the_first_one_known() -> None:
    model = CostModel(512)
    for _ in range(30):
        for rows in (128, 256, 512):
            model.observe(plain(rows), 10e-3 + 1e-3 * rows)
    below = [model.seconds(plain(rows)) for rows in (0, 1, 8, 64, 128)]
    assert below == sorted(below)
    assert below[0] == below[1] > 0
    assert below[-1] == pytest.approx(0.138, rel=0.05)


# Properties

COUNTS = st.integers(0, 3000)
LOADS = st.builds(StepLoad, COUNTS, st.integers(0, 64), st.integers(0, 10**6), st.integers(0, 64), st.integers(0, 600))
STEPS = st.lists(st.tuples(LOADS, st.floats(1e-5, 100)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2100), STEPS, LOADS)
def test_whatever_was_observed_predictions_are_positive_and_never_fall(
    max_tokens: int, steps: list[tuple[StepLoad, float]], rest: StepLoad
) -> None:
    model = CostModel(max_tokens)
    for load, seconds in steps:
        model.observe(load, seconds)
    times = model.seconds_by_tokens(np.arange(5000), rest)
    assert times.dtype == np.float64
    assert np.isfinite(times).all()
    assert (times > 0).all()
    assert (np.diff(times) >= 0).all()
    now = model.seconds(rest)
    assert now == times[rest.tokens] == model.seconds_by_tokens(np.array([7, rest.tokens]), rest)[1]
    assert model.seconds(replace(rest, context_tokens=rest.context_tokens + 500)) >= now
    assert model.seconds(replace(rest, drafted_requests=rest.drafted_requests + 1)) >= now
    assert model.seconds(replace(rest, drafted_slots=rest.drafted_slots + 5)) >= now
    again = CostModel.from_json(json.loads(json.dumps(model.to_json())))
    assert (again.seconds_by_tokens(np.arange(5000), rest) == times).all()


@settings(max_examples=30, deadline=None)
@given(STEPS)
def test_the_same_steps_give_the_same_model(steps: list[tuple[StepLoad, float]]) -> None:
    models = CostModel(300), CostModel(300)
    for model in models:
        for load, seconds in steps:
            model.observe(load, seconds)
    assert models[0].to_json() == models[1].to_json()
    assert models[0].observations == len(steps)


@settings(max_examples=30, deadline=None)
@given(st.floats(-6, 6))
def test_times_in_another_unit_are_learned_as_well(exponent: float) -> None:
    model, scaled, unit = CostModel(512), CostModel(512), 2.0**exponent
    rng = np.random.default_rng(3)
    for _ in range(60):
        load = CPU[3][1](rng)
        seconds = measured(rng, cpu_like(load))
        model.observe(load, seconds)
        scaled.observe(load, seconds * unit)
    assert scaled.seconds(plain(40, 900)) == pytest.approx(model.seconds(plain(40, 900)) * unit, rel=1e-6)


def test_error_is_that_of_predictions_made_before_their_steps() -> None:
    rng, model, errors = np.random.default_rng(0), CostModel(512), []
    for k in range(260):
        load = CPU[3][0](rng)
        seconds = measured(rng, cpu_like(load))
        if k:
            errors.append(abs(model.seconds(load) / seconds - 1))
        model.observe(load, seconds)
    assert model.error == pytest.approx(median(errors[-200:]), rel=1e-9)
    assert 0.04 < model.error < 0.1  # the noise's own median is 0.067


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_time_is_refused(seconds: float) -> None:
    model = CostModel(8)
    with pytest.raises(ValueError, match=f"positive and finite, not {seconds}"):
        model.observe(plain(1), seconds)
    assert model.to_json() == CostModel(8).to_json()


@pytest.mark.parametrize("field", ["tokens", "requests", "context_tokens", "drafted_requests", "drafted_slots"])
def test_a_negative_count_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"must not be negative: .*{field}=-1"):
        replace(plain(1), **{field: -1})


@pytest.mark.parametrize("max_tokens", [0, -3, 1 << 31])
def test_an_impossible_size_is_refused(max_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"max_tokens must be from 1 to .*, not {max_tokens}"):
        CostModel(max_tokens)


# Calibration


@pytest.mark.parametrize(
    ("rows", "requests", "slots"), [(512, 32, 7), (8192, 256, 8), (1000, 3, 4), (1, 1, 4), (8, 64, 0)]
)
def test_calibration_loads_are_possible_distinct_and_cheapest_first(rows: int, requests: int, slots: int) -> None:
    loads = calibration_loads(rows, requests, block_slots=slots)
    assert len(set(loads)) == len(loads)
    assert loads[0].tokens == 1
    assert max(load.tokens for load in loads) == rows
    for load in loads:
        assert 1 <= load.requests <= min(load.tokens, requests)
        assert load.tokens <= load.context_tokens
        assert load.drafted_slots <= load.drafted_requests * slots
    costs = [CostModel(rows).seconds(load) for load in loads]
    assert all(a <= b for a, b in pairwise(costs))


def test_calibration_loads_tell_all_terms_apart() -> None:
    columns = []
    for load in calibration_loads(256, 16):
        hats = np.interp(load.tokens, 2.0 ** np.arange(9), np.arange(9)) - np.arange(9)
        others = (load.requests, load.context_tokens, load.tokens * load.mean_context, load.drafted_requests > 0)
        columns.append([*np.maximum(0, 1 - abs(hats)), *others, load.drafted_requests, load.drafted_slots])
    matrix = np.array(columns)
    assert np.linalg.matrix_rank(matrix / np.abs(matrix).max(axis=0), tol=1e-3) == 9 + 6


@pytest.mark.parametrize("wrong", [(0, 1, 8, 10), (8, 0, 8, 10), (8, 1, -1, 10), (8, 1, 8, -1)])
def test_an_impossible_calibration_is_refused(wrong: tuple[int, int, int, int]) -> None:
    rows, requests, slots, context = wrong
    with pytest.raises(ValueError, match=f"not {rows}, {requests}, {slots} and {context}"):
        calibration_loads(rows, requests, block_slots=slots, context=context)


# Files


@pytest.fixture(scope="module")
def learned() -> CostModel:
    return calibrated(np.random.default_rng(0), CPU)


def test_a_saved_model_predicts_and_learns_as_the_one_saved(learned: CostModel, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "cost.json"
    save_cost_model(path, "this machine", learned)
    assert list(path.parent.iterdir()) == [path]
    model, reason = load_cost_model(path, "this machine")
    assert model is not None
    assert reason == f"step times learned from {learned.observations} steps are read from {path}"
    assert model.to_json() == learned.to_json()
    assert model.max_tokens == 512
    original, rng = copy.deepcopy(learned), np.random.default_rng(1)
    for _ in range(20):
        load = CPU[3][0](rng)
        seconds = measured(rng, cpu_like(load))
        for each in (model, original):
            each.observe(load, seconds)
    assert model.to_json() == original.to_json()


def test_a_failed_save_leaves_the_old_file_and_no_other(
    learned: CostModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cost.json"
    save_cost_model(path, "a", learned)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            save_cost_model(path, "b", learned)
    assert list(tmp_path.iterdir()) == [path]
    assert load_cost_model(path, "a")[0] is not None


def test_a_missing_or_unreadable_file_is_told(tmp_path: Path) -> None:
    assert load_cost_model(tmp_path / "none", "a") == (None, f"no step times are saved in {tmp_path / 'none'}")
    model, reason = load_cost_model(tmp_path, "a")
    assert model is None
    assert "cannot be read: Is a directory" in reason


def test_a_truncated_file_is_never_used(learned: CostModel, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    save_cost_model(path, "a", learned)
    whole = path.read_bytes()
    for length in (0, 1, *range(2, len(whole) - 1, len(whole) // 40), len(whole) - 1):
        path.write_bytes(whole[:length])
        model, reason = load_cost_model(path, "a")
        assert model is None
        assert "not JSON" in reason
    path.write_bytes(b"[" * 100_000)
    assert load_cost_model(path, "a")[0] is None
    path.write_bytes(b"\xff\xfe\x00")
    assert load_cost_model(path, "a")[0] is None


def _changed(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(saved: dict[str, Any]) -> None:
        saved["model"][key] = change(saved["model"][key])

    return apply


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda saved: saved.update(schema=1), "not of schema 2"),
        (lambda saved: saved.pop("schema"), "not of schema 2"),
        (lambda saved: saved.update(identity="b"), "are of 'b', not of 'a'"),
        (lambda saved: saved.pop("identity"), "are of None, not of 'a'"),
        (lambda saved: saved.update(model=[1]), "must be a JSON object, not list"),
        (lambda saved: saved.pop("model"), "must be a JSON object, not NoneType"),
        (_changed("max_tokens", lambda _: 1024), "terms must be finite numbers of shape"),
        (_changed("max_tokens", lambda _: 0), "max_tokens must be from 1"),
        (_changed("max_tokens", lambda _: True), "max_tokens must be a whole number, not True"),
        (_changed("observations", lambda _: -1), "observations must be a whole number, not -1"),
        (_changed("observations", lambda _: 1.5), "observations must be a whole number"),
        (_changed("log_speed", lambda _: math.nan), "log_speed must be finite"),
        (_changed("log_speed", lambda _: math.inf), "log_speed must be finite"),
        (_changed("log_speed", lambda _: None), "log_speed must be finite"),
        (_changed("log_speed", lambda _: 31.0), "log_speed must lie within 30"),
        (_changed("log_speed", lambda _: 10**400), "log_speed is not made of numbers"),
        (_changed("terms", lambda terms: terms[:-1]), "terms must be finite numbers of shape"),
        (_changed("terms", lambda terms: [*terms[:-1], -0.1]), "terms must be positive"),
        (_changed("terms", lambda terms: [0.0, *terms[1:]]), "terms must be positive"),
        (_changed("terms", lambda terms: [1e15, *terms[1:]]), "at most e^30"),
        (_changed("terms", lambda terms: [*terms[:-1], math.nan]), "terms must be finite"),
        (_changed("terms", lambda terms: [*terms[:-1], {}]), "terms is not made of numbers"),
        (_changed("covariance", lambda rows: rows[:-1]), "covariance must be finite numbers of shape"),
        (_changed("covariance", lambda rows: [*rows[:-1], rows[-1][:-1]]), "covariance is not made of numbers"),
        (_changed("covariance", lambda rows: [[-x for x in row] for row in rows]), "variances must lie above 0"),
        (_changed("covariance", lambda rows: [[1e6 * x for x in row] for row in rows]), "not above the prior's"),
        (
            _changed("covariance", lambda rows: [[x + 1e-3 * (j > 3) for j, x in enumerate(row)] for row in rows]),
            "symm",
        ),
        (
            _changed(
                "covariance", lambda rows: [[1e-4 + (i != j) for i in range(len(row))] for j, row in enumerate(rows)]
            ),
            "not positive semidefinite",
        ),
    ],
)
def test_a_file_that_cannot_be_trusted_is_never_used(
    learned: CostModel, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], reason: str
) -> None:
    path = tmp_path / "cost.json"
    save_cost_model(path, "a", learned)
    saved = json.loads(path.read_text())
    spoil(saved)
    path.write_text(json.dumps(saved))
    model, why = load_cost_model(path, "a")
    assert model is None
    assert reason in why
    assert str(path) in why


# Cost of the model itself


def test_predicting_and_learning_cost_little(
    learned: CostModel, record_property: Callable[[str, object], None]
) -> None:
    model, load, many = copy.deepcopy(learned), StepLoad(9, 2, 900, 2, 14), np.arange(1, 4001)
    calls: dict[str, Callable[[], object]] = {
        "seconds": lambda: model.seconds(load),
        "seconds_by_tokens of 4,000": lambda: model.seconds_by_tokens(many, load),
        "observe": lambda: model.observe(load, 0.03),
    }
    for name, call in calls.items():
        best = math.inf
        for _ in range(100):
            start = time.thread_time()
            call()
            best = min(best, time.thread_time() - start)
        record_property(name, f"{1e6 * best:.0f} microseconds")
        print(f"{name}: {1e6 * best:.0f} microseconds")
        assert best < 1e-3, name
