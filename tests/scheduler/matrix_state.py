"""What an exactness matrix has finished, on disk, so that one that was cut off goes on where it was."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.scheduler.matrix_cells import TEMPERATURE, Load
from tests.scheduler.matrix_questions import Question

_FILE = "answers.jsonl"


@dataclass(frozen=True, slots=True)
class Counters:
    """What an engine did meanwhile.

    Attributes:
        verified_draft_tokens, accepted_draft_tokens: drafted tokens that the target checked, and that it found right.
        preemptions: requests that lost their K/V pages to others and were read again.
        prefix_cache_hits: prompt tokens whose K/V pages were found cached.
        prompts_longer_than_a_step: prompts with more tokens than one step holds.
    """

    verified_draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    preemptions: int = 0
    prefix_cache_hits: int = 0
    prompts_longer_than_a_step: int = 0

    def __add__(self, other: "Counters") -> "Counters":
        return self._each(other, int.__add__)

    def __sub__(self, other: "Counters") -> "Counters":
        return self._each(other, int.__sub__)

    def _each(self, other: "Counters", combine: Callable[[int, int], int]) -> "Counters":
        mine, theirs = asdict(self), asdict(other)
        return Counters(**{name: combine(count, theirs[name]) for name, count in mine.items()})


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished load.

    Attributes:
        answers: token ids of each question, in order.
        counters: of the engine, what the load added to them.
        seconds: that it took.
        code: digest of the sources that the engine ran.
    """

    answers: tuple[tuple[int, ...], ...]
    seconds: float
    code: str
    counters: Counters


class MatrixState:
    """The finished loads of one matrix, in ``answers.jsonl``: a line of JSON for each, behind one that says of what.

    A load counts once its line is whole: what a process that was cut off has written of one is overwritten.

    Args:
        folder: where the file is, or will be.
        questions: of the matrix.

    Raises:
        ValueError: the folder's answers are to other questions.
    """

    def __init__(self, folder: Path, questions: Sequence[Question]):
        self._path = folder / _FILE
        self._finished: dict[tuple[str, int], Finished] = {}
        header = json.dumps({"questions": _digest(questions)})
        whole = self._path.read_bytes().rpartition(b"\n")[0] if self._path.exists() else b""
        first, *lines = whole.decode().splitlines() or [header]
        if first != header:
            raise ValueError(f"{self._path} has answers to other questions: {first}, expected {header}")
        for plain in map(json.loads, lines):
            self._finished[plain["cell"], plain["first"]] = _finished(plain)
        self._path.touch()
        os.truncate(self._path, len(whole) + 1 if whole else 0)
        if not whole:
            self._append(header)

    def get(self, load: Load) -> Finished | None:
        """What came of a load, ``None`` if it is still to be done."""
        finished = self._finished.get(load.key)
        return finished if finished and len(finished.answers) == load.end - load.first else None

    def add(self, load: Load, finished: Finished) -> None:
        """Remember a finished load, on disk too."""
        self._finished[load.key] = finished
        self._append(json.dumps({"cell": load.cell.name, "first": load.first, **asdict(finished)}))

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def _finished(plain: dict[str, Any]) -> Finished:
    answers = tuple(tuple(answer) for answer in plain["answers"])
    return Finished(answers, plain["seconds"], plain["code"], Counters(**plain["counters"]))


def _digest(questions: Sequence[Question]) -> str:
    plain = json.dumps([TEMPERATURE, *map(asdict, questions)])
    return hashlib.sha256(plain.encode()).hexdigest()[:16]
