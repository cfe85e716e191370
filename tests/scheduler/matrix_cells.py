"""The cells of the exactness matrix: which engine answers which questions, how sampled, how many at a time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Sampling = Literal["greedy", "seeded", "mixed"]

TEMPERATURE = 0.8
LOAD = 50
"""Questions of one load, the unit in which work is done and remembered."""

_CONCURRENCIES = (1, 3, 8)
_CHUNKS = (64, 512)
_OTHER_SET_QUESTIONS = 20
_SAMPLINGS: tuple[Sampling, ...] = ("greedy", "seeded")
_ROOMY = ("--engine.kv_cache_gib=0.1", "--no-engine.prefix_caching")
_CRAMPED = ("--engine.kv_cache_gib=0.03", "--engine.prefix_caching")


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """One engine of the matrix.

    Attributes:
        instruction_set: value of ``engine.instruction_set``.
        drafting: the drafter is on.
        chunk: tokens of one step; longer prompts are read in chunks.
        reference: it gives the answers that all others of its instruction set are compared with: one request at a
            time, with memory enough, prompts read whole and none found cached. The others have so little memory that
            requests preempt each other, and find prompts cached.
    """

    instruction_set: str
    drafting: bool
    chunk: int
    reference: bool = False

    @property
    def name(self) -> str:
        """For people and for file names."""
        if self.reference:
            return f"{self.instruction_set} reference"
        return f"{self.instruction_set} {'drafting' if self.drafting else 'plain'} chunk {self.chunk}"

    @property
    def flags(self) -> tuple[str, ...]:
        """Settings flags of ``slipstream serve``."""
        return (
            "--model.max_model_len=512",
            "--engine.max_num_seqs=8",
            f"--engine.max_num_batched_tokens={self.chunk}",
            f"--engine.instruction_set={self.instruction_set}",
            *(_ROOMY if self.reference else _CRAMPED),
            "--speculation.enabled" if self.drafting else "--no-speculation.enabled",
            "--speculation.min_draft_tokens=1",  # drafts are to be verified at every load
        )


@dataclass(frozen=True, slots=True)
class Cell:
    """Questions for one engine.

    Attributes:
        sampling: ``greedy``; ``seeded`` at ``TEMPERATURE``; or ``mixed``, greedy and seeded in turn.
        concurrency: requests in flight at the same time.
        questions: how many, from the first.
    """

    engine: EngineSetup
    sampling: Sampling
    concurrency: int
    questions: int

    @property
    def name(self) -> str:
        """Unique in a matrix."""
        return f"{self.engine.name}, {self.sampling}, {self.concurrency} at once"

    def is_seeded(self, question: int) -> bool:
        """Whether the question of this index is sampled rather than answered greedily."""
        return self.sampling == "seeded" or (self.sampling == "mixed" and question % 2 == 1)


@dataclass(frozen=True, slots=True)
class Load:
    """The questions ``first`` to ``end`` (exclusive) of a cell."""

    cell: Cell
    first: int
    end: int

    @property
    def key(self) -> tuple[str, int]:
        """Unique in a matrix."""
        return self.cell.name, self.first


def matrix(instruction_sets: Sequence[str], questions: int) -> tuple[Cell, ...]:
    """All cells, engine by engine; of each instruction set the reference first.

    Args:
        instruction_sets: the first gets the full matrix, the others a small part of it.
        questions: how many there are.
    """
    cells: list[Cell] = []
    for number, name in enumerate(instruction_sets):
        count = questions if number == 0 else min(questions, _OTHER_SET_QUESTIONS)
        reference = EngineSetup(name, drafting=False, chunk=max(_CHUNKS), reference=True)
        cells += [Cell(reference, sampling, 1, count) for sampling in _SAMPLINGS]
        if number > 0:
            engine = EngineSetup(name, drafting=True, chunk=min(_CHUNKS))
            cells += [Cell(engine, sampling, max(_CONCURRENCIES), count) for sampling in _SAMPLINGS]
            continue
        for engine in [EngineSetup(name, drafting, chunk) for drafting in (False, True) for chunk in _CHUNKS]:
            for concurrency in _CONCURRENCIES:
                cells += [Cell(engine, sampling, concurrency, count) for sampling in _SAMPLINGS]
            cells.append(Cell(engine, "mixed", max(_CONCURRENCIES), count))
    return tuple(cells)


def loads(cells: Iterable[Cell]) -> tuple[Load, ...]:
    """The cells in pieces of at most ``LOAD`` questions, in order."""
    return tuple(
        Load(cell, first, min(first + LOAD, cell.questions))
        for cell in cells
        for first in range(0, cell.questions, LOAD)
    )


def seconds_left(done: Sequence[tuple[Load, float]], remaining: Iterable[Load]) -> float | None:
    """An estimate of how long the remaining loads take.

    A question takes the mean of the finished ones that are like it: of its instruction set and concurrency where there
    are any, else of its instruction set, else of all.

    Args:
        done: finished loads and the seconds that each took.
        remaining: loads still to come.

    Returns:
        Seconds, or ``None`` as long as nothing is finished.
    """
    if not done:
        return None
    samples: dict[tuple[object, ...], list[tuple[int, float]]] = {}
    for load, seconds in done:
        for key in _likenesses(load):
            samples.setdefault(key, []).append((load.end - load.first, seconds))
    total = 0.0
    for load in remaining:
        alike = next(samples[key] for key in _likenesses(load) if key in samples)
        total += (load.end - load.first) * sum(seconds for _, seconds in alike) / sum(count for count, _ in alike)
    return total


def _likenesses(load: Load) -> tuple[tuple[object, ...], ...]:
    name = load.cell.engine.instruction_set
    return (name, load.cell.concurrency), (name,), ()
