import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.errors import BenchError
from bench.simulate_costs import Gpu, GpuCost, LearnedCost, ReplayCost, Workload, find_gpu, read_cost
from scheduler.cost import CostModel, StepLoad, save_cost_model

WORK = Workload(
    target_params=100.0,
    drafter_params=10.0,
    bytes_per_weight=2.0,
    kv_bytes_per_token=4.0,
    efficiency=0.5,
    step_overhead_seconds=0.25,
    draft_overhead_seconds=0.125,
)
GPU = Gpu("a GPU", bandwidth=800.0, flops=8000.0)  # reached: 400 bytes/s and 4000 operations/s
PLAIN = StepLoad(1, 1, 0, 0, 0)


def seconds(cost: ReplayCost, tokens: int, rest: StepLoad = PLAIN) -> float:
    return float(cost.seconds_by_tokens(np.array([tokens]), rest)[0])


def test_a_step_reads_its_weights_or_computes_whichever_takes_longer() -> None:
    cost = GpuCost(GPU, WORK)
    assert [seconds(cost, tokens) for tokens in (1, 10, 20)] == [0.25 + 0.5, 0.25 + 0.5, 0.25 + 1.0]
    assert cost.seconds_by_tokens(np.array([1, 10, 20]), PLAIN).tolist() == [0.75, 0.75, 1.25]


def test_the_context_is_read_besides() -> None:
    assert seconds(GpuCost(GPU, WORK), 20, StepLoad(20, 1, 300, 0, 0)) == 0.25 + 1.0 + 3.0


def test_the_drafter_runs_behind_the_target_and_only_if_it_drafts() -> None:
    cost = GpuCost(GPU, WORK)
    assert seconds(cost, 1, StepLoad(1, 1, 0, 2, 6)) == 0.25 + 0.5 + 0.125 + 0.05
    assert seconds(cost, 1, StepLoad(1, 1, 0, 2, 38)) == 0.25 + 0.5 + 0.125 + 2 * 10 * 40 / 4000


def test_all_that_is_assumed_is_said() -> None:
    assert GpuCost(GPU, WORK).assumptions == {
        "kind": "roofline",
        "gpu": "a GPU",
        "bandwidth_bytes_per_second": 800.0,
        "bfloat16_flops": 8000.0,
        "target_params": 100.0,
        "drafter_params": 10.0,
        "bytes_per_weight": 2.0,
        "kv_bytes_per_token": 4.0,
        "efficiency": 0.5,
        "step_overhead_seconds": 0.25,
        "draft_overhead_seconds": 0.125,
    }


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "Rtx 4090"])
def test_gpus_are_found_by_name(name: str) -> None:
    assert find_gpu(name) == Gpu("RTX 4090", 1008e9, 165e12)


def test_an_unknown_gpu_is_a_mistake() -> None:
    with pytest.raises(BenchError, match="--gpu GTX 1: known are H200, H100, A100, "):
        find_gpu("GTX 1")


def test_a_saved_cost_model_is_the_truth(tmp_path: Path) -> None:
    model = CostModel(64)
    for tokens in range(1, 60):
        model.observe(StepLoad(tokens, 1, 10, 0, 0), 0.01 + 0.001 * tokens)
    path = tmp_path / "cost.json"
    save_cost_model(path, "a CPU, a target", model)
    cost = read_cost(path)
    for tokens in (1, 7, 64, 100):
        assert seconds(cost, tokens) == pytest.approx(model.seconds(StepLoad(tokens, 1, 0, 0, 0)))
    assert cost.assumptions == {
        "kind": "learned",
        "file": "cost.json",
        "identity": "a CPU, a target",
        "steps": 59,
        "most_tokens": 64,
    }


def measured(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A table of steps that take 10 ms, 1 ms for each row past 8, and 2 ms for drafting."""
    steps = [
        {
            "tokens": tokens,
            "requests": 1,
            "context_tokens": 0,
            "drafted_requests": drafted,
            "drafted_slots": 4 * drafted,
            "seconds": 0.01 + 0.001 * max(tokens - 8, 0) + 0.002 * drafted,
        }
        for tokens in (1, 2, 4, 8, 16, 32, 64)
        for drafted in (0, 1)
    ]
    steps[2].update(changes or {})
    return {"schema": "slipstream-steps", "version": 1, "machine": "a CPU", "steps": steps}


def write(folder: Path, plain: object) -> Path:
    path = folder / "steps.json"
    path.write_text(json.dumps(plain))
    return path


def test_a_table_of_measured_steps_is_fitted(tmp_path: Path) -> None:
    table = measured()
    cost = read_cost(write(tmp_path, table))
    for step in table["steps"]:
        load = StepLoad(**{name: step[name] for name in step if name != "seconds"})
        assert seconds(cost, load.tokens, load) == pytest.approx(step["seconds"], rel=0.05)
    assert seconds(cost, 48) == pytest.approx(0.05, rel=0.1)
    said = cost.assumptions
    assert (said["kind"], said["machine"], said["steps"], said["most_tokens"]) == ("measured", "a CPU", 14, 64)
    assert 0 <= said["median_error_of_fit"] <= said["largest_error_of_fit"] < 0.05


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ([], 'holds no step times: "schema" is null, expected 2 of a saved cost model or "slipstream-steps"'),
        ({"schema": 9}, 'holds no step times: "schema" is 9'),
        ({"schema": 2, "model": 3}, "holds no usable cost model: a cost model must be a JSON object, not int"),
        ({**measured(), "version": 2}, ": version 2 of measured steps; version 1 is read"),
        ({**measured(), "steps": []}, ': "steps" must be a list of at least 8 measured steps'),
        ({**measured(), "steps": [3] * 8}, ": step 1 is not an object with tokens, requests, "),
        (measured({"tokens": 0}), ": step 3: tokens is 0, expected a whole number from 1"),
        (measured({"drafted_slots": -1}), ": step 3: drafted_slots is -1, expected a whole number from 0"),
        (measured({"requests": None}), ": step 3: requests is null, expected a whole number from 0"),
        (measured({"seconds": 0}), ": step 3: seconds is 0, expected a number above 0"),
        (measured({"seconds": float("nan")}), ": step 3: seconds is NaN, expected a number above 0"),
    ],
)
def test_other_files_are_mistakes_and_named(tmp_path: Path, plain: object, message: str) -> None:
    path = write(tmp_path, plain)
    with pytest.raises(BenchError) as caught:
        read_cost(path)
    assert str(caught.value).startswith(f"{path}") and message in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot read the step times .*none: No such file or directory"):
        read_cost(tmp_path / "none")
    path = tmp_path / "steps.json"
    path.write_text("{")
    with pytest.raises(BenchError, match="steps.json holds no step times: not JSON: "):
        read_cost(path)
    assert isinstance(read_cost(write(tmp_path, measured())), LearnedCost)
