"""The policies of a simulation, by the names that the command takes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.errors import BenchError
from bench.simulate_costs import ReplayCost
from scheduler.adaptive import AdaptivePolicy
from scheduler.cost import CostModel, calibration_loads
from scheduler.fixed_policies import AdaptiveDraftLength, BatchTable, FixedLength
from scheduler.policy import DraftPolicy, SurvivalFloor

__all__ = ["DEFAULT_TABLE", "KNOWN", "Machine", "NamedPolicy", "default_policies", "find_policies", "parse_table"]

KNOWN = (
    "none: no drafts; fixed:K: always K tokens; table: by the number of requests, see --table; adl or adl:LEAST: "
    "DiffuSpec's moving averages; floor:P: tokens that are reached with at least the probability P; adaptive: the "
    "server's own, from a cold start; adaptive:calibrated: the same, shown the times of some steps before"
)
DEFAULT_TABLE = "1=7,4=5,16=3,64=1,256=0"

_CALIBRATION_RUNS = 3
_ADL_LEAST = 2 / 3  # of the longest draft: the paper's lengths go from 20 to 30


@dataclass(frozen=True, slots=True)
class Machine:
    """What a policy may know of the server that it is made for.

    Attributes:
        cost: of steps; only ``adaptive:calibrated`` is shown some.
        most_requests: of a step.
        context: tokens of a usual request.
        noise: relative standard deviation of measured times.
    """

    cost: ReplayCost
    most_requests: int
    context: int
    noise: float


@dataclass(frozen=True, slots=True)
class NamedPolicy:
    """A policy by its name.

    Attributes:
        name: as it was given.
        make: a fresh one.
    """

    name: str
    make: Callable[[Machine], DraftPolicy]


def default_policies(slots: int) -> str:
    """What is simulated by default with drafts of up to ``slots`` tokens."""
    fixed = [f"fixed:{length}" for length in range(1, min(slots, 7) + 1)]
    return ",".join(["none", *fixed, "table", "adl", "floor:0.12", "adaptive", "adaptive:calibrated"])


def parse_table(text: str, slots: int) -> BatchTable:
    """The table ``REQUESTS=TOKENS,...``; raises ``BenchError`` for another text."""
    lengths: dict[int, int] = {}
    for part in text.split(","):
        start, _, length = part.strip().partition("=")
        if not (start.isdecimal() and length.isdecimal()) or int(start) in lengths:
            raise BenchError(f'--table {text}: "{part.strip()}" is not one more entry REQUESTS=TOKENS')
        lengths[int(start)] = min(int(length), slots)
    try:
        return BatchTable(lengths)
    except ValueError as error:
        raise BenchError(f"--table {text}: {error}") from error


def find_policies(text: str, slots: int, table: str) -> tuple[NamedPolicy, ...]:
    """The policies of a comma-separated list.

    Args:
        text: what was given.
        slots: longest draft.
        table: of ``--table``.

    Raises:
        BenchError: a policy is unknown, given twice, or its parameter is out of range.
    """
    names = [part.strip() for part in text.split(",")]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise BenchError(f"--policies: {twice} is given twice")
    return tuple(NamedPolicy(name, _maker(name, slots, table)) for name in names)


def _maker(name: str, slots: int, table: str) -> Callable[[Machine], DraftPolicy]:
    kind, _, parameter = name.partition(":")
    if kind == "fixed":
        length = _length(name, parameter, 0, slots)
        return lambda _: FixedLength(length)
    if kind == "floor":
        floor = _probability(name, parameter)
        return lambda _: SurvivalFloor(floor, slots)
    if kind == "adl":
        least = _length(name, parameter, 1, slots) if parameter else max(round(slots * _ADL_LEAST), 1)
        return lambda _: AdaptiveDraftLength(least, slots, slots - least)
    if name == "none":
        return lambda _: FixedLength(0)
    if name == "table":
        parse_table(table, slots)
        return lambda _: parse_table(table, slots)
    if name == "adaptive":
        return lambda machine: AdaptivePolicy(slots, 0, CostModel(machine.most_requests * (1 + slots)))
    if name == "adaptive:calibrated":
        return lambda machine: AdaptivePolicy(slots, 0, _calibrated(machine, slots))
    raise BenchError(f'--policies: "{name}" is unknown; known are {KNOWN}')


def _calibrated(machine: Machine, slots: int) -> CostModel:
    """A cost model that was shown the steps of a calibration, some times each."""
    most, noises = machine.most_requests * (1 + slots), np.random.default_rng(0)
    model = CostModel(most)
    for _ in range(_CALIBRATION_RUNS):
        for load in calibration_loads(most, machine.most_requests, block_slots=slots, context=machine.context):
            seconds = float(machine.cost.seconds_by_tokens(np.array([load.tokens]), load)[0])
            model.observe(load, seconds * noises.lognormal(0, machine.noise))
    return model


def _length(name: str, parameter: str, least: int, most: int) -> int:
    if not parameter.isdecimal() or not least <= int(parameter) <= most:
        raise BenchError(f"--policies: {name} needs a whole number from {least} to {most}, the longest recorded draft")
    return int(parameter)


def _probability(name: str, parameter: str) -> float:
    try:
        value = float(parameter)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise BenchError(f"--policies: {name} needs a probability from 0 to 1, as in floor:0.12")
    return value
