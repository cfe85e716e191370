"""The report of ``slipstream simulate``: a JSON file with a public schema, and the same as text.

The file holds one object, ``SimulationReport``; every attribute is a key of the same name. It is written again after
every load, always whole. Everything in it is simulated, which it says in ``simulated``; times are in seconds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.json_file import write_json
from bench.simulate_replay import Measured
from bench.terminal import align_columns

__all__ = [
    "CLAIRVOYANT",
    "EXPECTED",
    "Load",
    "SimulatedRow",
    "SimulationReport",
    "TraceEntry",
    "make_row",
    "render_simulation",
    "with_regret",
    "write_simulation",
]

SCHEMA_VERSION = 1

EXPECTED, CLAIRVOYANT = "oracle: expected", "oracle: clairvoyant"
"""Names of the policies to compare with: one knows the acceptance probabilities and the cost, one the outcomes."""

_HEADER = (
    *("load", "policy", "tokens/s", "within objective", "per token, ms", "verified", "tokens/step"),
    *("vs none", "regret", "vs clairvoyant"),
)
_NUMBERS_FROM = 2


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: ``concurrency`` of them all the time, or ``rate`` a second; the other is ``None``."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g}/s"


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """A trace that was replayed.

    Attributes:
        file: its name, without the folder.
        target, drafter, policy: of its header; ``policy`` is the one that was recorded.
        requests, drafts: that it holds.
        censored: drafts whose outcome is not known to the end; above 0 only where drafts were cut to what is known.
    """

    file: str
    target: str
    drafter: str
    policy: str
    requests: int
    drafts: int
    censored: int


@dataclass(frozen=True, slots=True)
class SimulatedRow:
    """One policy under one load.

    Attributes:
        policy, load: what the row is about.
        seconds, tokens: simulated time that was counted, and tokens emitted in it.
        tokens_per_second: of all requests.
        goodput: tokens per second of the requests that met the objective; ``None`` without one.
        per_token_p50_seconds, per_token_p95_seconds: half (95 %) of the tokens belong to requests that took at most
            this long per token, waiting for their start aside.
        verified_per_step, tokens_per_step: draft tokens verified and tokens emitted, per request and step.
        mean_requests: in a step.
        speedup: tokens per second over those of ``none``; ``None`` where that was not simulated.
        regret: how many tokens per second fewer than the expected oracle's, as a share of them. Negative where its
            probabilities, which are estimates in a replay of real traces, are beaten. ``None`` where requests come
            at a rate, which sets the tokens per second.
        regret_clairvoyant: the same with the clairvoyant oracle.
    """

    policy: str
    load: Load
    seconds: float
    tokens: int
    tokens_per_second: float
    goodput: float | None
    per_token_p50_seconds: float
    per_token_p95_seconds: float
    verified_per_step: float
    tokens_per_step: float
    mean_requests: float
    speedup: float | None = None
    regret: float | None = None
    regret_clairvoyant: float | None = None


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """A whole report.

    Attributes:
        complete: all that was asked for was simulated.
        created: when it was started, UTC, ISO 8601.
        command: the command line that made it.
        traces: that were replayed.
        cost: where the times of steps come from and all that is assumed.
        settings: of the replay.
        rows: by load, then policy.
        simulated: always ``true``.
        schema_version: of this format.
    """

    complete: bool
    created: str
    command: tuple[str, ...]
    traces: tuple[TraceEntry, ...]
    cost: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: tuple[SimulatedRow, ...]
    simulated: bool = True
    schema_version: int = SCHEMA_VERSION


def make_row(policy: str, load: Load, steps: int, measured: Measured, objective: float | None) -> SimulatedRow:
    """A row without comparisons.

    Args:
        policy: its name.
        load: that it met.
        steps: that were counted.
        measured: in them.
        objective: seconds per token that a request may take.
    """
    return SimulatedRow(
        policy=policy,
        load=load,
        seconds=measured.seconds,
        tokens=measured.tokens,
        tokens_per_second=measured.tokens / measured.seconds,
        goodput=None if objective is None else measured.within(objective) / measured.seconds,
        per_token_p50_seconds=measured.latency(0.5),
        per_token_p95_seconds=measured.latency(0.95),
        verified_per_step=measured.verified / measured.request_steps,
        tokens_per_step=measured.tokens / measured.request_steps,
        mean_requests=measured.request_steps / steps,
    )


def with_regret(row: SimulatedRow, rows: Mapping[str, SimulatedRow]) -> SimulatedRow:
    """A row with its comparisons, given those of all policies under the same load by name."""
    plain = rows.get("none")
    closed = row.load.rate is None

    def regret(oracle: str) -> float | None:
        return 1 - row.tokens_per_second / rows[oracle].tokens_per_second if closed else None

    changes = {
        "speedup": row.tokens_per_second / plain.tokens_per_second if plain else None,
        "regret": regret(EXPECTED),
        "regret_clairvoyant": regret(CLAIRVOYANT),
    }
    return SimulatedRow(**{**{name: getattr(row, name) for name in SimulatedRow.__slots__}, **changes})


def write_simulation(report: SimulationReport, path: Path) -> None:
    """Write a report in one step; raises ``BenchError`` where that is not possible."""
    plain = asdict(report)
    first = ("schema_version", "simulated", "complete")
    write_json({key: plain[key] for key in dict.fromkeys([*first, *plain])}, path)


def render_simulation(report: SimulationReport) -> str:
    """The report as lines of text: what was assumed, and the rows as a table."""
    return "\n".join(_lines(report))


def _lines(report: SimulationReport) -> Iterator[str]:
    yield "SIMULATED: recorded drafts replayed on step times that are " + _KINDS[report.cost["kind"]]
    for trace in report.traces:
        cut = f"; {trace.censored} of unknown outcome, all drafts are cut to what was verified" * (trace.censored > 0)
        yield (
            f"trace {trace.file}: {trace.drafts} drafts of {trace.requests} requests, target {trace.target}, "
            f"drafter {trace.drafter or 'none'}, recorded with {trace.policy}{cut}"
        )
    yield "cost: " + _listed(report.cost)
    yield "replay: " + _listed(report.settings)
    yield ""
    empty = {
        column
        for column, name in ((3, "goodput"), (7, "speedup"), (8, "regret"), (9, "regret_clairvoyant"))
        if all(getattr(row, name) is None for row in report.rows)
    }
    lines = [_HEADER, *map(_cells, report.rows)]
    yield align_columns(
        [[text for column, text in enumerate(line) if column not in empty] for line in lines], _NUMBERS_FROM
    )
    yield ""
    yield (
        "regret: tokens/s short of the expected oracle, which knows acceptance probabilities and cost; the clairvoyant "
        "one knows outcomes and is out of reach."
    )


_KINDS = {
    "roofline": "the bounds of a data sheet",
    "learned": "a learned cost model's predictions",
    "measured": "fitted to measured steps",
}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_figure(value)}" for name, value in values.items())


def _figure(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cells(row: SimulatedRow) -> tuple[str, ...]:
    return (
        str(row.load),
        row.policy,
        f"{row.tokens_per_second:.1f}",
        "-" if row.goodput is None else f"{row.goodput:.1f}",
        f"{1000 * row.per_token_p50_seconds:.2f}, p95 {1000 * row.per_token_p95_seconds:.2f}",
        f"{row.verified_per_step:.2f}",
        f"{row.tokens_per_step:.2f}",
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
        _percent(row.regret),
        _percent(row.regret_clairvoyant),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{round(100 * share, 1) + 0:.1f} %"  # + 0: no negative zero
