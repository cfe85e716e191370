"""Collecting the corpus: the target answers prompts while a recorder keeps its hidden states."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from drafter.align.corpus import AnswerId, is_held_out, recorded_ids
from drafter.align.prompts import OWN_SUBJECTS, Prompt, Turn, distinct, opening, same_text, usable_turn

_LONGEST_TURN = 96  # tokens of a user turn that the target writes


@dataclass(frozen=True, slots=True)
class Written:
    """What the target answered: its text, and how many tokens that took; none if it was not asked."""

    text: str
    tokens: int


class AnswerEngine(Protocol):
    """The serving engine, as far as collecting needs it."""

    async def answer(
        self, request_id: str, turns: Sequence[Turn], temperature: float, max_tokens: int, seed: int
    ) -> Written:
        """Let the target answer a conversation. The recorder sees ``request_id``."""
        ...

    async def user_turn(
        self, request_id: str, turns: Sequence[Turn], temperature: float, max_tokens: int, seed: int
    ) -> str:
        """Let the target write what a user might say behind ``turns``."""
        ...

    async def flush(self) -> None:
        """Make the recorder write everything it holds."""
        ...


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """What to collect.

    Attributes:
        folder: corpus folder; answers it already holds are not asked for again.
        temperatures: each prompt is answered at each of them, all prompts once before any of them twice.
        held_out_temperatures: the same for prompts that are kept from training.
        follow_ups: share of the conversations that the target continues: with a user turn of its own, and an answer.
        max_answer_tokens: longest answer.
        target_tokens: stop when this many answer tokens were written in this run.
        concurrency: requests in flight.
        seed: order of the prompts.
    """

    folder: Path
    temperatures: tuple[float, ...] = (0.0, 0.7)
    held_out_temperatures: tuple[float, ...] = (0.0, 1.0)
    follow_ups: float = 0.2
    max_answer_tokens: int = 192
    target_tokens: int = 500_000
    concurrency: int = 96
    seed: int = 0


def plan_answers(prompts: Sequence[Prompt], options: CollectOptions) -> list[AnswerId]:
    """The first answers of the conversations still to be had, in a shuffled order that is the same on every run."""
    done, chance = recorded_ids(options.folder), random.Random(options.seed)
    indices = distinct(prompts)
    plan: list[AnswerId] = []
    for turn in range(max(len(options.temperatures), len(options.held_out_temperatures))):
        chance.shuffle(indices)
        for index in indices:
            temperatures = options.held_out_temperatures if is_held_out(index) else options.temperatures
            if turn < len(temperatures):
                temperature = temperatures[(index + turn) % len(temperatures)]
                plan.append(AnswerId(prompts[index].category, index, temperature))
    return [answer for answer in plan if str(answer) not in done]


async def collect(
    engine: AnswerEngine, prompts: Sequence[Prompt], options: CollectOptions, progress: Callable[[int], None]
) -> int:
    """Answer prompts until ``target_tokens`` are written or the prompts run out; returns the tokens written.

    ``progress`` is called with the tokens of every finished answer. Finished answers are on disk even when the
    run is interrupted; the recorder writes a shard as soon as enough have gathered.
    """
    queue = iter(plan_answers(prompts, options))
    written = 0

    async def ask(answer: AnswerId, turns: Sequence[Turn]) -> Written:
        nonlocal written
        longest = options.max_answer_tokens
        result = await engine.answer(str(answer), turns, answer.temperature, longest, answer.seed)
        written += result.tokens
        progress(result.tokens)
        return result

    async def worker() -> None:
        for answer in queue:
            if written >= options.target_tokens:
                return
            turns = prompts[answer.prompt_index].turns
            result = await ask(answer, turns)
            if result.tokens and random.Random(answer.seed).random() < options.follow_ups:
                turns = (*turns, Turn("assistant", result.text))
                name = f"turn-{answer}".replace("/", ".")  # not to be taken for an answer
                text = usable_turn(await engine.user_turn(name, turns, 1.0, _LONGEST_TURN, answer.seed))
                if text is not None:
                    await ask(replace(answer, turn=1), (*turns, Turn("user", text)))

    try:
        await _all(worker, options.concurrency)
    finally:
        await engine.flush()
    return written


async def write_own_prompts(
    engine: AnswerEngine, count: int, seed: int, concurrency: int, progress: Callable[[int], None]
) -> list[Prompt]:
    """Let the target write ``count`` different user turns; ``progress`` is called with 1 for every one kept.

    Gives up on the rest after four times as many attempts, should the target only ramble.
    """
    attempts = iter(range(4 * count))
    kept: dict[str, Prompt] = {}

    async def worker() -> None:
        for attempt in attempts:
            if len(kept) >= count:
                return
            category, system = OWN_SUBJECTS[attempt % len(OWN_SUBJECTS)]
            name, before = f"turn-{attempt}", opening(system)
            text = usable_turn(await engine.user_turn(name, before, 1.0, _LONGEST_TURN, seed + attempt))
            if text is not None and same_text(text) not in kept and len(kept) < count:
                kept[same_text(text)] = Prompt(category, text, system)
                progress(1)

    await _all(worker, concurrency)
    return list(kept.values())


async def _all(worker: Callable[[], Coroutine[None, None, None]], count: int) -> None:
    """Run ``count`` workers to their end; when one fails the others are cancelled first, then its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(worker())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
