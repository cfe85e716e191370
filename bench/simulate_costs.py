"""What a simulated step costs: times learned or measured on a machine, or bounds from a data sheet."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bench.errors import BenchError
from scheduler.cost import SCHEMA, CostModel, StepLoad

__all__ = ["GPUS", "STEPS_SCHEMA", "Gpu", "GpuCost", "ReplayCost", "Workload", "find_gpu", "read_cost"]

STEPS_SCHEMA = "slipstream-steps"
"""Of a table of measured steps."""

_STEPS_VERSION = 1
_FEWEST_STEPS = 8
_OBSERVATIONS = 2_000  # of a table, at least: its steps are shown to the model again and again
_MOST_PASSES = 200

Floats = npt.NDArray[np.float64]


class ReplayCost(Protocol):
    """The true cost of a replay's steps."""

    @property
    def assumptions(self) -> Mapping[str, Any]:
        """Where the times come from and all that is assumed, JSON values by name."""
        ...

    def seconds_by_tokens(self, tokens: npt.NDArray[np.int64], rest: StepLoad) -> Floats:
        """``[n]`` seconds of steps of so many tokens, otherwise like ``rest``."""
        ...


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        name: as it is sold.
        bandwidth: of its memory, bytes/s.
        flops: bfloat16 operations/s of matrix products with float32 sums, without sparsity.
    """

    name: str
    bandwidth: float
    flops: float


GPUS = {
    gpu.name.lower().replace(" ", ""): gpu
    for gpu in (
        Gpu("H200", 4.8e12, 989e12),
        Gpu("H100", 3.35e12, 989e12),
        Gpu("A100", 2.039e12, 312e12),
        Gpu("L40S", 864e9, 362e12),
        Gpu("L4", 300e9, 121e12),
        Gpu("A10", 600e9, 125e12),
        Gpu("RTX 4090", 1008e9, 165e12),
        Gpu("RTX 3090", 936e9, 71e12),
    )
}
"""Data-sheet figures: SXM variants of H100 and H200, the 80 GB SXM variant of A100."""


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, whatever its case and spaces; raises ``BenchError`` for an unknown one."""
    gpu = GPUS.get(name.lower().replace(" ", ""))
    if gpu is None:
        raise BenchError(f"--gpu {name}: known are {', '.join(known.name for known in GPUS.values())}")
    return gpu


@dataclass(frozen=True, slots=True)
class Workload:
    """What the models ask of a GPU.

    Attributes:
        target_params: weights that every token of the target meets, the output head included.
        drafter_params: the same of the drafter.
        bytes_per_weight: of both.
        kv_bytes_per_token: keys and values of one context token in all layers of the target.
        efficiency: share of the data sheet's bandwidth and arithmetic that is reached.
        step_overhead_seconds: of each step that are neither.
        draft_overhead_seconds: the same of each run of the drafter.
    """

    target_params: float
    drafter_params: float
    bytes_per_weight: float
    kv_bytes_per_token: float
    efficiency: float
    step_overhead_seconds: float
    draft_overhead_seconds: float


class GpuCost:
    """The roofline (Williams et al. 2009) of target and drafter on one GPU, one after the other.

    A forward pass takes as long as reading its weights or as its matrix products, whichever is longer. Keys and
    values of the context are read besides by the target; what attention computes, activations, sampling and prompts
    are left out. The drafter computes each drafted slot and one token more per drafted request.
    """

    def __init__(self, gpu: Gpu, workload: Workload):
        self._gpu, self._work = gpu, workload
        self._bandwidth, self._flops = gpu.bandwidth * workload.efficiency, gpu.flops * workload.efficiency

    @property
    def assumptions(self) -> Mapping[str, Any]:
        """See ``ReplayCost``."""
        return {
            "kind": "roofline",
            "gpu": self._gpu.name,
            "bandwidth_bytes_per_second": self._gpu.bandwidth,
            "bfloat16_flops": self._gpu.flops,
            **asdict(self._work),
        }

    def seconds_by_tokens(self, tokens: npt.NDArray[np.int64], rest: StepLoad) -> Floats:
        """See ``ReplayCost``."""
        work = self._work
        seconds = work.step_overhead_seconds + self._forward(work.target_params, np.asarray(tokens, dtype=np.float64))
        seconds += work.kv_bytes_per_token * rest.context_tokens / self._bandwidth
        if rest.drafted_requests:
            slots = np.float64(rest.drafted_slots + rest.drafted_requests)
            seconds += work.draft_overhead_seconds + self._forward(work.drafter_params, slots)
        return seconds

    def _forward(self, params: float, tokens: Floats | np.float64) -> Floats:
        reading = params * self._work.bytes_per_weight / self._bandwidth
        return np.maximum(reading, 2 * params * tokens / self._flops)


class LearnedCost:
    """The predictions of a cost model, taken for the truth."""

    def __init__(self, model: CostModel, assumptions: Mapping[str, Any]):
        self._model = model
        self._assumptions = assumptions

    @property
    def assumptions(self) -> Mapping[str, Any]:
        """See ``ReplayCost``."""
        return self._assumptions

    def seconds_by_tokens(self, tokens: npt.NDArray[np.int64], rest: StepLoad) -> Floats:
        """See ``ReplayCost``."""
        return self._model.seconds_by_tokens(tokens, rest)


def read_cost(path: Path) -> ReplayCost:
    """The cost in a file: a model that ``scheduler.cost.save_cost_model`` wrote, or a table of measured steps.

    A table is ``{"schema": "slipstream-steps", "version": 1, "machine": ..., "steps": [...]}``, where each step has the
    attributes of ``StepLoad`` and ``seconds``. A cost model is fitted to it, and how well is among the assumptions.

    Raises:
        BenchError: the file cannot be read, or is neither.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"cannot read the step times {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{path} holds no step times: not JSON: {error}") from error
    schema = plain.get("schema") if isinstance(plain, dict) else None
    if schema == STEPS_SCHEMA:
        return _fitted(path, plain)
    if schema != SCHEMA:
        raise BenchError(
            f'{path} holds no step times: "schema" is {json.dumps(schema)}, expected {SCHEMA} '
            f'of a saved cost model or "{STEPS_SCHEMA}" of measured steps'
        )
    try:
        model = CostModel.from_json(plain.get("model"))
    except ValueError as error:
        raise BenchError(f"{path} holds no usable cost model: {error}") from error
    return LearnedCost(
        model,
        {
            "kind": "learned",
            "file": path.name,
            "identity": str(plain.get("identity")),
            "steps": model.observations,
            "most_tokens": model.max_tokens,
        },
    )


def _fitted(path: Path, plain: Mapping[str, Any]) -> ReplayCost:
    if plain.get("version") != _STEPS_VERSION:
        raise BenchError(
            f"{path}: version {plain.get('version')!r} of measured steps; version {_STEPS_VERSION} is read"
        )
    entries = plain.get("steps")
    if not isinstance(entries, list) or len(entries) < _FEWEST_STEPS:
        raise BenchError(f'{path}: "steps" must be a list of at least {_FEWEST_STEPS} measured steps')
    steps = [_step(path, number, entry) for number, entry in enumerate(entries, start=1)]
    model = CostModel(max(load.tokens for load, _ in steps))
    order = np.random.default_rng(0)
    for _ in range(min(-(-_OBSERVATIONS // len(steps)), _MOST_PASSES)):
        for index in order.permutation(len(steps)).tolist():
            model.observe(*steps[index])
    errors = [abs(model.seconds(load) / seconds - 1) for load, seconds in steps]
    return LearnedCost(
        model,
        {
            "kind": "measured",
            "file": path.name,
            "machine": str(plain.get("machine", "unknown")),
            "steps": len(steps),
            "most_tokens": model.max_tokens,
            "median_error_of_fit": round(float(np.median(errors)), 4),
            "largest_error_of_fit": round(max(errors), 4),
        },
    )


def _step(path: Path, number: int, entry: object) -> tuple[StepLoad, float]:
    names = [attribute.name for attribute in fields(StepLoad)]
    if not isinstance(entry, dict):
        raise BenchError(f"{path}: step {number} is not an object with {', '.join(names)} and seconds")
    for name in names:
        if type(entry.get(name)) is not int or entry[name] < (name == "tokens"):
            least = int(name == "tokens")
            raise BenchError(
                f"{path}: step {number}: {name} is {json.dumps(entry.get(name))}, expected a whole number from {least}"
            )
    seconds = entry.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise BenchError(f"{path}: step {number}: seconds is {json.dumps(seconds)}, expected a number above 0")
    return StepLoad(**{name: entry[name] for name in names}), float(seconds)
