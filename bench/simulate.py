"""The ``slipstream simulate`` command: recorded drafts replayed under several policies, on step times of any machine.

Nothing is measured here, and every output says so.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bench.errors import BenchError
from bench.simulate_options import SimulateOptions, add_arguments, read_options
from bench.simulate_policies import Machine
from bench.simulate_replay import Arrivals, ClosedLoop, PoissonArrivals, Replay, Span
from bench.simulate_report import (
    CLAIRVOYANT,
    EXPECTED,
    Load,
    SimulatedRow,
    SimulationReport,
    make_row,
    render_simulation,
    with_regret,
    write_simulation,
)
from scheduler.oracle import Oracle
from scheduler.trace import TraceError
from server.progress import Progress, ProgressBar, part

__all__ = ["add_arguments", "run"]

_MISTAKE = 2
_STEP_WORK = 40  # requests whose share of the work of simulating a step is as much as the step's own


def run(args: argparse.Namespace) -> int:
    """Simulate and print a table; returns the exit code: 0, or 2 for bad input.

    Args:
        args: of a parser that ``add_arguments`` was called with.
    """
    try:
        print(_simulate(read_options(args)))
    except (BenchError, TraceError) as error:
        print(f"slipstream: error: {error}", file=sys.stderr)
        return _MISTAKE
    return 0


def _simulate(options: SimulateOptions) -> str:
    report = _empty_report(options)
    total = sum(_work(options, load) for load in options.loads)
    done = 0.0
    with ProgressBar("simulating") as bar:
        for load in options.loads:
            until = done + _work(options, load) / total
            report = replace(report, rows=(*report.rows, *_rows(options, load, part(bar, done, until))))
            done = until
            if options.json:
                write_simulation(replace(report, complete=load == options.loads[-1]), options.json)
    report = replace(report, complete=True)
    if options.plot:
        from bench.simulate_plot import draw_simulation

        draw_simulation(report, options.plot)
    return render_simulation(report)


def _empty_report(options: SimulateOptions) -> SimulationReport:
    return SimulationReport(
        complete=False,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=tuple(map(_without_folder, sys.argv)),
        traces=options.traces,
        cost=options.cost.assumptions,
        settings={
            "seed": options.seed,
            "warm_up_steps": options.warm_up,
            "least_steps": options.steps,
            "least_drafts": options.least_drafts,
            "ramp": options.ramp,
            "noise": options.noise,
            "objective_seconds": options.objective,
            "prompts": "take no time",
        },
        rows=(),
    )


def _without_folder(word: str) -> str:
    """A word of the command line for the report, which is published: files without their folders."""
    flag, equals, value = word.rpartition("=")
    return f"{flag}{equals}{Path(value).name}" if "/" in value else word


def _work(options: SimulateOptions, load: Load) -> float:
    """How much there is to compute for a load, in any unit."""
    requests = load.concurrency or options.max_requests
    return (options.warm_up + options.counted_steps(load)) * (requests + _STEP_WORK)


def _rows(options: SimulateOptions, load: Load, progress: Progress) -> list[SimulatedRow]:
    """All policies and both oracles under one load."""
    drafts, cost = options.drafts, options.cost
    most = max(each.concurrency or options.max_requests for each in options.loads)
    machine = Machine(cost, most, int(drafts.prompts.mean()), options.noise)
    truths = {EXPECTED: drafts.acceptance, CLAIRVOYANT: drafts.outcomes}
    policies = {policy.name: policy for policy in options.policies}
    names = [*policies, *truths]
    span = Span(options.warm_up, options.counted_steps(load))
    rows: dict[str, SimulatedRow] = {}
    for number, name in enumerate(names):
        replay = Replay(
            drafts,
            cost,
            Oracle(cost, drafts.slots) if name in truths else policies[name].make(machine),
            truths.get(name, drafts.acceptance),
            _arrivals(options, load),
            options.noise,
            options.seed,
        )
        shown = _one_of(part(progress, number / len(names), (number + 1) / len(names)), f"{load}, {name}")
        rows[name] = make_row(name, load, span.steps, replay.run(span, shown), options.objective)
    return [with_regret(row, rows) for row in rows.values()]


def _one_of(progress: Progress, stage: str) -> Callable[[float], None]:
    return lambda fraction: progress(fraction, stage)


def _arrivals(options: SimulateOptions, load: Load) -> Arrivals:
    if load.rate is not None:
        return PoissonArrivals(load.rate, options.max_requests, options.seed)
    return ClosedLoop(load.concurrency or 1, options.warm_up // 2 if options.ramp else 0)
