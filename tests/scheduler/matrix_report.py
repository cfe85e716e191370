"""Comparing the answers of an exactness matrix, and its report.

The report is a JSON file with one object, ``Report``, whose parts are the dataclasses of this module and
``bench.machine.Machine``; every attribute is a key of the same name.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.json_file import write_json
from bench.machine import Machine
from tests.scheduler.matrix_cells import Cell, Load, loads
from tests.scheduler.matrix_questions import Question
from tests.scheduler.matrix_state import Counters, Finished, MatrixState

SCHEMA_VERSION = 1

_SHOWN_DIFFERENCES = 5

Answers = Mapping[tuple[int, bool], tuple[int, ...]]
"""Token ids of answers by index of the question and whether it was sampled."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer that is not the reference's.

    Attributes:
        question: its index.
        seeded: it was sampled, with the question's seed; else greedy.
        position: of the first token that differs in the answer.
        expected, got: ids of that token; ``None`` where the answer had ended.
    """

    question: int
    seeded: bool
    position: int
    expected: int | None
    got: int | None


@dataclass(frozen=True, slots=True)
class CellReport:
    """What came of a cell.

    Attributes:
        engine: its settings flags.
        answers, tokens: how many there are.
        identical: answers that are the reference's, every token.
        first_differences: a few of the others.
        counters: of the engine.
        seconds: that the cell took; what else ran on the machine meanwhile was not controlled.
    """

    name: str
    engine: tuple[str, ...]
    sampling: str
    concurrency: int
    answers: int
    tokens: int
    identical: int
    first_differences: tuple[Difference, ...]
    counters: Counters
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """A whole report.

    Attributes:
        created: when the matrix was finished, UTC, ISO 8601.
        command: that made it.
        machine: what it ran on.
        instruction_sets: those of the matrix; what ``auto`` was on this machine is under its name.
        code: digests of the sources that engines ran; several if these changed meanwhile.
        questions: how many of each kind.
        sampled_otherwise: questions whose sampled answer is not the greedy one.
        answers, identical: over all cells but the references, which are what is compared with.
        counters: over all cells.
        not_seen: what had to happen in a cell for its comparison to mean anything, and did not.
        cells: one by one, references included.
        schema_version: of this description.
    """

    created: str
    command: tuple[str, ...]
    machine: Machine
    instruction_sets: Mapping[str, str]
    code: tuple[str, ...]
    questions: Mapping[str, int]
    sampled_otherwise: int
    answers: int
    identical: int
    counters: Counters
    not_seen: tuple[str, ...]
    cells: tuple[CellReport, ...]
    schema_version: int = SCHEMA_VERSION


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Position of the first token that differs, or that only one of them has; ``None`` for equal sequences."""
    for position, (left, right) in enumerate(zip(expected, got, strict=False)):
        if left != right:
            return position
    return None if len(expected) == len(got) else min(len(expected), len(got))


def differences(load: Load, answers: Sequence[Sequence[int]], reference: Answers) -> list[Difference]:
    """Where a load's answers are not the reference's.

    Args:
        load: what was asked.
        answers: token ids, in order.
        reference: answers to all its questions.
    """
    found = []
    for question, got in zip(range(load.first, load.end), answers, strict=True):
        seeded = load.cell.is_seeded(question)
        expected = reference[question, seeded]
        position = first_difference(expected, got)
        if position is not None:
            found.append(Difference(question, seeded, position, _at(expected, position), _at(got, position)))
    return found


def reference_answers(cells: Iterable[Cell], state: MatrixState, instruction_set: str) -> Answers:
    """The answers that all others of an instruction set are compared with, as far as there are any."""
    answers: dict[tuple[int, bool], tuple[int, ...]] = {}
    for load in loads(cells):
        finished = state.get(load)
        if finished and load.cell.engine.reference and load.cell.engine.instruction_set == instruction_set:
            for question, answer in zip(range(load.first, load.end), finished.answers, strict=True):
                answers[question, load.cell.is_seeded(question)] = answer
    return answers


def build_report(
    cells: Sequence[Cell],
    questions: Sequence[Question],
    state: MatrixState,
    command: Sequence[str],
    machine: Machine,
    instruction_sets: Mapping[str, str],
) -> Report:
    """The report of a matrix.

    Args:
        cells: all finished.
        questions: of the matrix.
        state: what came of the cells.
        command, machine, instruction_sets: see ``Report``.
    """
    references = {name: reference_answers(cells, state, name) for name in instruction_sets}
    reports = tuple(_cell_report(cell, state, references[cell.engine.instruction_set]) for cell in cells)
    compared = [report for cell, report in zip(cells, reports, strict=True) if not cell.engine.reference]
    first = next(iter(references.values()))
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=tuple(command),
        machine=machine,
        instruction_sets=instruction_sets,
        code=tuple(sorted({finished.code for _, finished in _finished(cells, state)})),
        questions=dict(Counter(question.kind for question in questions)),
        sampled_otherwise=sum(first[index, True] != first[index, False] for index in range(len(questions))),
        answers=sum(report.answers for report in compared),
        identical=sum(report.identical for report in compared),
        counters=sum((report.counters for report in reports), Counters()),
        not_seen=tuple(text for cell, report in zip(cells, reports, strict=True) for text in not_seen(cell, report)),
        cells=reports,
    )


def write_report(report: Report, path: Path) -> None:
    """Write a report in one step: readers see the old file or the new one, never half of one.

    Raises:
        BenchError: the file cannot be written.
    """
    plain = asdict(report)
    write_json({"schema_version": plain.pop("schema_version"), **plain}, path)


def not_seen(cell: Cell, report: CellReport) -> list[str]:
    """What had to happen in a cell for its comparison to mean anything, and did not."""
    needed = {
        "accepted_draft_tokens": cell.engine.drafting,
        "preemptions": not cell.engine.reference and cell.concurrency == 8,
        "prefix_cache_hits": not cell.engine.reference,
        "prompts_longer_than_a_step": cell.engine.chunk == 64,
    }
    seen = asdict(report.counters)
    return [f"{cell.name}: {name}" for name, is_needed in needed.items() if is_needed and not seen[name]]


def _cell_report(cell: Cell, state: MatrixState, reference: Answers) -> CellReport:
    finished = _finished([cell], state)
    different = [found for load, done in finished for found in differences(load, done.answers, reference)]
    answers = [answer for _, done in finished for answer in done.answers]
    return CellReport(
        name=cell.name,
        engine=cell.engine.flags,
        sampling=cell.sampling,
        concurrency=cell.concurrency,
        answers=len(answers),
        tokens=sum(map(len, answers)),
        identical=len(answers) - len(different),
        first_differences=tuple(different[:_SHOWN_DIFFERENCES]),
        counters=sum((done.counters for _, done in finished), Counters()),
        seconds=round(sum(done.seconds for _, done in finished), 1),
    )


def _finished(cells: Iterable[Cell], state: MatrixState) -> list[tuple[Load, Finished]]:
    pairs = [(load, state.get(load)) for load in loads(cells)]
    if unfinished := [load.key for load, finished in pairs if finished is None]:
        raise ValueError(f"{len(unfinished)} loads are not finished, the first is {unfinished[0]}")
    return [(load, finished) for load, finished in pairs if finished is not None]


def _at(tokens: Sequence[int], position: int) -> int | None:
    return tokens[position] if position < len(tokens) else None
