"""The exactness matrix without engines: what is asked, what counts as different, and that nothing is asked twice."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bench.machine import Machine
from tests.scheduler.exactness_matrix import run, summary
from tests.scheduler.matrix_cells import Cell, EngineSetup, Load, Sampling, loads, matrix, seconds_left
from tests.scheduler.matrix_questions import questions
from tests.scheduler.matrix_report import (
    Difference,
    Report,
    build_report,
    differences,
    first_difference,
    not_seen,
    reference_answers,
    write_report,
)
from tests.scheduler.matrix_state import Counters, Finished, MatrixState

_ASKED = questions()[:60]
_SETS = {"auto": "avx512", "scalar": "scalar"}
_CELLS = matrix(tuple(_SETS), len(_ASKED))
_MACHINE = Machine("a processor", (), 2, None, None, "a system", "3.11", None, None, None, None)
_EVERYTHING = Counters(9, 5, 2, 64, 3)

Answer = Callable[[Load, int], tuple[int, ...]]


def _truth(load: Load, question: int) -> tuple[int, ...]:
    """An answer that depends on what it may depend on: question, sampling and instruction set."""
    return (question, int(load.cell.is_seeded(question)), len(load.cell.engine.instruction_set), 7, 8)


class Engines:
    """Stands in for real engines; ``started`` and ``answered`` tell what was asked of it."""

    def __init__(self, answer: Answer = _truth, counters: Counters = _EVERYTHING, fail_after: int | None = None):
        self.started: list[EngineSetup] = []
        self.answered: list[Load] = []
        self._answer, self._counters, self._fail_after = answer, counters, fail_after

    @contextmanager
    def __call__(self, setup: EngineSetup) -> Iterator[Callable[[Load], Finished]]:
        self.started.append(setup)
        yield self._finish

    def _finish(self, load: Load) -> Finished:
        if self._fail_after == len(self.answered):
            raise KeyboardInterrupt
        assert load.cell.engine == self.started[-1]
        self.answered.append(load)
        answers = tuple(self._answer(load, question) for question in range(load.first, load.end))
        return Finished(answers, 2.0, "cafe", self._counters)


Outcome = tuple[Report, list[str], Engines]


def _report(folder: Path, engines: Engines) -> Outcome:
    said: list[str] = []
    state = MatrixState(folder, _ASKED)
    run(_CELLS, state, engines, said.append)
    return build_report(_CELLS, _ASKED, state, ["python"], _MACHINE, _SETS), said, engines


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A matrix in which nothing differs."""
    return _report(tmp_path_factory.mktemp("complete"), Engines())


def test_questions_are_two_hundred_different_ones_of_all_kinds() -> None:
    asked = questions()
    assert (
        len(asked) == len({question.prompt for question in asked}) == len({question.seed for question in asked}) == 200
    )
    kinds = [question.kind for question in asked]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "archive": 50,
        **dict.fromkeys(("chat", "list", "code", "arithmetic", "translation"), 30),
    }
    assert {question.max_tokens for question in asked} == set(range(16, 33))
    assert asked == questions()


def test_archives_come_in_tens_that_begin_alike() -> None:
    archives = [question.prompt for question in questions() if question.kind == "archive"]
    beginnings = [prompt[:200] for prompt in archives]
    assert [beginnings[10 * group : 10 * group + 10] for group in range(5)] == [
        [beginnings[10 * group]] * 10 for group in range(5)
    ]
    assert len(set(beginnings)) == 5


def test_the_full_matrix_crosses_everything_and_other_sets_get_a_part() -> None:
    cells = matrix(("auto", "avx2", "scalar"), 200)
    assert len({cell.name for cell in cells}) == len(cells)
    full = [cell for cell in cells if cell.engine.instruction_set == "auto" and not cell.engine.reference]
    crossed = {
        (cell.engine.drafting, cell.engine.chunk, cell.sampling, cell.concurrency)
        for cell in full
        if cell.sampling != "mixed"
    }
    assert crossed == {
        (drafting, chunk, sampling, concurrency)
        for drafting in (False, True)
        for chunk in (64, 512)
        for sampling in ("greedy", "seeded")
        for concurrency in (1, 3, 8)
    }
    assert {cell.questions for cell in full} == {200}
    for name in ("avx2", "scalar"):
        part = [cell for cell in cells if cell.engine.instruction_set == name]
        assert {(cell.engine.drafting, cell.sampling, cell.questions) for cell in part} == {
            (drafting, sampling, 20) for drafting in (False, True) for sampling in ("greedy", "seeded")
        }


def test_references_come_first_and_decode_plainly() -> None:
    for name in _SETS:
        cells = [cell for cell in _CELLS if cell.engine.instruction_set == name]
        assert [cell.engine.reference for cell in cells] == [True, True] + [False] * (len(cells) - 2)
        assert [(cell.sampling, cell.concurrency) for cell in cells[:2]] == [("greedy", 1), ("seeded", 1)]
        flags = cells[0].engine.flags
        assert {"--no-speculation.enabled", "--no-engine.prefix_caching", f"--engine.instruction_set={name}"} <= {
            *flags
        }


def test_engines_of_a_matrix_differ_in_name_and_flags() -> None:
    setups = {cell.engine for cell in matrix(("auto", "avx2", "scalar"), 200)}
    assert len({setup.name for setup in setups}) == len({setup.flags for setup in setups}) == len(setups) == 9


@pytest.mark.parametrize(("sampling", "seeded"), [("greedy", [0, 0, 0]), ("seeded", [1, 1, 1]), ("mixed", [0, 1, 0])])
def test_which_questions_are_sampled(sampling: Sampling, seeded: list[int]) -> None:
    cell = Cell(_CELLS[0].engine, sampling, 1, 3)
    assert [cell.is_seeded(question) for question in range(3)] == [bool(one) for one in seeded]


def test_loads_cover_each_question_of_a_cell_once() -> None:
    cell = replace(_CELLS[0], questions=120)
    assert [(load.first, load.end) for load in loads([cell])] == [(0, 50), (50, 100), (100, 120)]


@pytest.mark.parametrize(
    ("expected", "got", "position"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([], [], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 2, 3], 2),
        ([], [4], 0),
    ],
)
def test_first_difference(expected: list[int], got: list[int], position: int | None) -> None:
    assert first_difference(expected, got) == position


def test_differences_name_question_sampling_and_tokens() -> None:
    load = Load(Cell(_CELLS[0].engine, "mixed", 8, 13), 10, 13)
    reference = {(10, False): (1, 2), (11, True): (3, 4), (11, False): (3, 5), (12, False): (6, 7)}
    assert differences(load, [(1, 2), (3, 5), (6,)], reference) == [
        Difference(11, True, 1, expected=4, got=5),
        Difference(12, False, 1, expected=7, got=None),
    ]


def test_a_matrix_without_differences(complete: Outcome) -> None:
    report, said, engines = complete
    compared = [cell for cell in _CELLS if not cell.engine.reference]
    assert report.answers == report.identical == sum(cell.questions for cell in compared)
    assert report.not_seen == () and report.code == ("cafe",)
    assert report.sampled_otherwise == len(_ASKED)
    assert report.counters.preemptions == 2 * len(loads(_CELLS))
    assert len(engines.started) == len({cell.engine for cell in _CELLS})
    assert not any("DIFFER" in line for line in said)
    assert said[-1].startswith(f"{len(loads(_CELLS))} of {len(loads(_CELLS))}, about 0 min left: ")
    assert (
        summary(report).splitlines()[0].startswith(f"{report.answers} of {report.answers} answers are the reference's")
    )


@pytest.mark.parametrize(
    "name", ["auto drafting chunk 64, mixed, 8 at once", "scalar drafting chunk 64, greedy, 8 at once"]
)
def test_one_other_token_in_one_cell_is_found(name: str, tmp_path: Path) -> None:
    def answer(load: Load, question: int) -> tuple[int, ...]:
        right = _truth(load, question)
        return (*right[:3], 0, 8) if load.cell.name == name and question == 17 else right

    report, said, _ = _report(tmp_path, Engines(answer))
    assert report.answers - report.identical == 1
    (cell,) = [cell for cell in report.cells if cell.first_differences]
    assert (cell.name, cell.answers - cell.identical) == (name, 1)
    assert cell.first_differences == (Difference(17, "mixed" in name, 3, expected=7, got=0),)
    assert len([line for line in said if "1 DIFFER" in line]) == 1
    assert name in summary(report)


def test_few_of_many_differences_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    report, _, _ = _report(tmp_path, Engines(lambda load, q: (0,) if load.cell.engine.drafting else _truth(load, q)))
    for cell, result in zip(_CELLS, report.cells, strict=True):
        assert (result.identical, len(result.first_differences)) == (
            (0, 5) if cell.engine.drafting else (cell.questions, 0)
        )


@pytest.mark.parametrize(
    ("counters", "missing"),
    [
        (replace(_EVERYTHING, preemptions=0), {cell.name for cell in _CELLS if cell.concurrency == 8}),
        (replace(_EVERYTHING, accepted_draft_tokens=0), {cell.name for cell in _CELLS if cell.engine.drafting}),
        (replace(_EVERYTHING, prefix_cache_hits=0), {cell.name for cell in _CELLS if not cell.engine.reference}),
        (replace(_EVERYTHING, prompts_longer_than_a_step=0), {c.name for c in _CELLS if c.engine.chunk == 64}),
    ],
)
def test_what_did_not_happen_is_said(counters: Counters, missing: set[str], complete: Outcome) -> None:
    results = [replace(result, counters=counters) for result in complete[0].cells]
    unseen = [text for cell, result in zip(_CELLS, results, strict=True) for text in not_seen(cell, result)]
    assert {text.rpartition(": ")[0] for text in unseen} == missing


def test_what_was_finished_is_not_asked_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _report(tmp_path, Engines(fail_after=13))
    rest = Engines()
    report, said, _ = _report(tmp_path, rest)
    assert said[0] == f"13 of {len(loads(_CELLS))} loads were finished before"
    assert rest.answered == [*loads(_CELLS)[13:]]
    assert report.identical == report.answers
    nothing = Engines()
    again, _, _ = _report(tmp_path, nothing)
    assert nothing.started == []
    assert again.cells == report.cells


def test_a_load_is_on_disk_as_soon_as_it_is_finished_and_nothing_else_is(tmp_path: Path) -> None:
    load = loads(_CELLS)[2]
    finished = Finished(((1, 2), (3,)) * 25, 1.5, "cafe", _EVERYTHING)
    MatrixState(tmp_path, _ASKED).add(load, finished)
    state = MatrixState(tmp_path, _ASKED)
    assert state.get(load) == finished
    assert [other for other in loads(_CELLS) if state.get(other)] == [load]


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_that_was_cut_off_counts_for_nothing(cut: int, tmp_path: Path) -> None:
    one, other = loads(_CELLS)[:2]
    finished = Finished(((1,),) * 50, 1.0, "cafe", Counters()), Finished(((2,),) * 10, 1.0, "cafe", Counters())
    state = MatrixState(tmp_path, _ASKED)
    state.add(one, finished[0])
    state.add(other, finished[1])
    file = tmp_path / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])

    resumed = MatrixState(tmp_path, _ASKED)
    assert (resumed.get(one), resumed.get(other)) == (finished[0], None)
    resumed.add(other, finished[1])
    again = MatrixState(tmp_path, _ASKED)
    assert (again.get(one), again.get(other)) == finished


def test_a_header_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    MatrixState(tmp_path, _ASKED)
    header = file.read_bytes()
    file.write_bytes(header[:-5])
    MatrixState(tmp_path, _ASKED)
    assert file.read_bytes() == header


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    MatrixState(tmp_path, _ASKED).add(loads(_CELLS)[0], Finished(((1,),) * 50, 1.0, "cafe", Counters()))
    with pytest.raises(ValueError, match="answers to other questions"):
        MatrixState(tmp_path, _ASKED[:-1])


def test_no_report_of_an_unfinished_matrix(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="loads are not finished, the first is .'auto reference, greedy, 1 at once', 0."
    ):
        build_report(_CELLS, _ASKED, MatrixState(tmp_path, _ASKED), [], _MACHINE, _SETS)


def test_reference_answers_are_those_of_one_instruction_set(tmp_path: Path) -> None:
    state = MatrixState(tmp_path, _ASKED)
    run([cell for cell in _CELLS if cell.engine.reference], state, Engines(), lambda _: None)
    assert reference_answers(_CELLS, state, "scalar") == {
        (question, seeded): (question, int(seeded), 6, 7, 8) for question in range(20) for seeded in (False, True)
    }


def test_the_report_is_json_with_a_version(tmp_path: Path, complete: Outcome) -> None:
    write_report(complete[0], tmp_path / "report.json")
    plain = json.loads((tmp_path / "report.json").read_text())
    assert plain["schema_version"] == 1
    assert plain["instruction_sets"] == _SETS
    assert sum(plain["questions"].values()) == len(_ASKED)
    assert plain["cells"][2]["counters"]["preemptions"] == 2 * 2


def test_seconds_left_go_by_what_was_alike() -> None:
    def load(name: str, concurrency: int, count: int) -> Load:
        return Load(Cell(EngineSetup(name, True, 64), "greedy", concurrency, 200), 0, count)

    assert seconds_left([], [load("auto", 1, 50)]) is None
    done = [(load("auto", 1, 10), 20.0), (load("auto", 1, 30), 20.0), (load("auto", 8, 10), 5.0)]
    assert seconds_left(done, []) == 0
    assert seconds_left(done, [load("auto", 1, 50)]) == pytest.approx(50)
    assert seconds_left(done, [load("auto", 8, 50)]) == pytest.approx(25)
    assert seconds_left(done, [load("auto", 3, 10)]) == pytest.approx(9)
    assert seconds_left(done, [load("scalar", 1, 10), load("auto", 8, 2)]) == pytest.approx(9 + 1)


def test_counters_are_added_and_subtracted_one_by_one() -> None:
    one, other = Counters(1, 2, 3, 4, 5), Counters(10, 20, 30, 40, 50)
    assert one + other == Counters(11, 22, 33, 44, 55)
    assert other - one == Counters(9, 18, 27, 36, 45)
