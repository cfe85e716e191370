"""Does drafting ever change an answer? Two hundred questions, through every way that a real engine has of answering.

    python -m tests.scheduler.exactness_matrix --output docs/benchmarks/smollm2-135m-cpu-exactness.json

Answers with and without the drafter, greedy and seeded, one, three and eight at a time, with prompts read in long and
in short chunks, in memory so small that requests preempt each other, have to be the very tokens of the reference: one
request at a time, no drafter, no cached prompt. A smaller part does the same on the CPU kernels' other instruction
sets, each with a reference of its own. What is finished is remembered in a folder, and a matrix that was cut off goes
on from there.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import torch

from bench.arguments import existing_folder, output_file
from bench.errors import BenchError
from bench.interrupts import Interrupts
from bench.machine import describe_machine
from bench.servers import without_folders
from cuda_ext import ops
from tests.scheduler.matrix_cells import Cell, EngineSetup, Load, loads, matrix, seconds_left
from tests.scheduler.matrix_engine import serving
from tests.scheduler.matrix_questions import questions
from tests.scheduler.matrix_report import Answers, Report, build_report, differences, reference_answers, write_report
from tests.scheduler.matrix_state import Finished, MatrixState

STATE_VARIABLE = "EXACTNESS_MATRIX_STATE"

Answering = Callable[[EngineSetup], AbstractContextManager[Callable[[Load], Finished]]]
"""Starts an engine; what it gives answers the engine's loads."""


def instruction_sets() -> dict[str, str]:
    """Values of ``engine.instruction_set`` that this machine can serve, and what each is; empty without CPU kernels.

    The first is ``auto``, and the others are those that are left beside it.
    """
    if not ops.kernels().cpu_compiled:
        return {}
    best: str = torch.ops.slipstream.cpu_isa()
    others = [name for name in torch.ops.slipstream.supported_cpu_isas().split(",") if name != best]
    return {"auto": best} | {name: name for name in others if name in ("avx2", "scalar")}


def run(cells: Sequence[Cell], state: MatrixState, answering: Answering, say: Callable[[str], None]) -> None:
    """Finish what is not finished yet, engine by engine.

    Args:
        cells: of the matrix, each instruction set's references first.
        state: what is finished, and where what is finished here goes.
        answering: starts engines.
        say: takes a line for each event.
    """
    everything = loads(cells)
    done = [(load, finished.seconds) for load in everything if (finished := state.get(load))]
    remaining = deque(load for load in everything if state.get(load) is None)
    if done:
        say(f"{len(done)} of {len(everything)} loads were finished before")
    while remaining:
        setup = remaining[0].cell.engine
        say(f"{setup.name}: starting the engine")
        reference = None if setup.reference else reference_answers(cells, state, setup.instruction_set)
        with answering(setup) as answer:
            while remaining and remaining[0].cell.engine == setup:
                load = remaining[0]
                finished = answer(load)
                state.add(load, finished)
                remaining.popleft()
                done.append((load, finished.seconds))
                minutes = (seconds_left(done, remaining) or 0) / 60
                place = f"{len(done)} of {len(everything)}, about {minutes:.0f} min left"
                say(f"{place}: {load.cell.name}: {_outcome(load, finished, reference)}")


def run_matrix(folder: Path, limit: int | None, command: Sequence[str], say: Callable[[str], None]) -> Report:
    """The matrix on this machine, with real engines.

    Args:
        folder: for what is finished and for the engines' logs; holds what was finished before.
        limit: ask only so many of the questions; all without one.
        command: to note in the report.
        say: takes a line for each event.

    Raises:
        ValueError: the folder's answers are to other questions, or there are no CPU kernels.
        RuntimeError: an engine does not start.
    """
    available = instruction_sets()
    if not available:
        raise ValueError(f"the matrix needs the CPU kernels: {ops.kernels().cpu}")
    asked = questions()[:limit]
    cells = matrix(tuple(available), len(asked))
    state, machine = MatrixState(folder, asked), describe_machine()
    run(cells, state, lambda setup: serving(setup, folder, asked), say)
    return build_report(cells, asked, state, command, machine, available)


def summary(report: Report) -> str:
    """What came out, in a few lines."""
    counters = report.counters
    lines = [
        f"{report.identical} of {report.answers} answers are the reference's, token for token; "
        f"{report.sampled_otherwise} of {sum(report.questions.values())} sampled answers are not the greedy ones",
        f"{counters.accepted_draft_tokens} of {counters.verified_draft_tokens} verified draft tokens accepted, "
        f"{counters.preemptions} preemptions, {counters.prefix_cache_hits} prompt tokens found cached",
        *(f"{cell.name}: {cell.first_differences}" for cell in report.cells if cell.first_differences),
        *(f"not seen, so not checked: {text}" for text in report.not_seen),
    ]
    return "\n".join(lines)


def _outcome(load: Load, finished: Finished, reference: Answers | None) -> str:
    answers = f"{load.end - load.first} answers in {finished.seconds:.0f} s"
    if reference is None:
        return answers
    different = differences(load, finished.answers, reference)
    return (
        f"{answers}, {len(different)} DIFFER, the first is {different[0]}" if different else f"{answers}, all identical"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 only if every answer is identical and everything was seen."""
    parser = argparse.ArgumentParser(prog="exactness_matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="file of the report (JSON)")
    parser.add_argument("--state", help=f"folder to remember what is finished in; default: ${STATE_VARIABLE}, or none")
    parser.add_argument("--limit", type=int, help="ask only so many of the 200 questions")
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(words)
    state = options.state or os.environ.get(STATE_VARIABLE)

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    command = ("python", "-m", "tests.scheduler.exactness_matrix", *without_folders(words))
    with Interrupts() as interrupts, tempfile.TemporaryDirectory(prefix="slipstream-matrix-") as temporary:
        try:
            output = output_file(options.output)
            folder = existing_folder(state) if state else Path(temporary)
            report = run_matrix(folder, options.limit, command, say)
            write_report(report, output)
        except (BenchError, ValueError, RuntimeError, TimeoutError, httpx.HTTPError) as error:
            print(f"exactness_matrix: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 128 + interrupts.received
    print(summary(report))
    return 0 if report.identical == report.answers and not report.not_seen else 1


if __name__ == "__main__":
    sys.exit(main())
