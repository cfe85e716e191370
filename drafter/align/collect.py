"""Collecting the corpus: the target answers prompts while a recorder keeps its hidden states."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from drafter.align.corpus import AnswerId, recorded_ids
from drafter.align.prompts import Prompt, usable_turn


class AnswerEngine(Protocol):
    """The serving engine, as far as collecting needs it."""

    async def answer(self, request_id: str, prompt: str, temperature: float, max_tokens: int) -> int:
        """Let the target answer a user turn; returns the tokens it wrote. The recorder sees ``request_id``."""
        ...

    async def user_turn(self, request_id: str, temperature: float, max_tokens: int, seed: int) -> str:
        """Let the target write what a user might say."""
        ...

    async def flush(self) -> None:
        """Make the recorder write everything it holds."""
        ...


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """What to collect.

    Attributes:
        folder: corpus folder; answers it already holds are not asked for again.
        temperatures: answers of one prompt are sampled at each in turn: prompt ``i`` uses ``i`` modulo their number.
        max_answer_tokens: longest answer.
        target_tokens: stop when this many answer tokens were written in this run.
        concurrency: requests in flight.
        seed: order of the prompts.
    """

    folder: Path
    temperatures: tuple[float, ...] = (0.0, 0.7)
    max_answer_tokens: int = 192
    target_tokens: int = 500_000
    concurrency: int = 96
    seed: int = 0


def plan_answers(prompts: Sequence[Prompt], options: CollectOptions) -> list[AnswerId]:
    """The answers still to be written, in a shuffled order that is the same on every run."""
    done = recorded_ids(options.folder)
    temperatures = options.temperatures
    plan = [AnswerId(p.category, i, temperatures[i % len(temperatures)]) for i, p in enumerate(prompts)]
    random.Random(options.seed).shuffle(plan)
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

    async def worker() -> None:
        nonlocal written
        for answer in queue:
            if written >= options.target_tokens:
                return
            prompt = prompts[answer.prompt_index]
            tokens = await engine.answer(str(answer), prompt.text, answer.temperature, options.max_answer_tokens)
            written += tokens
            progress(tokens)

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
    turns: dict[str, None] = {}

    async def worker() -> None:
        for attempt in attempts:
            if len(turns) >= count:
                return
            text = usable_turn(await engine.user_turn(f"turn-{attempt}", 1.0, 96, seed + attempt))
            if text is not None and text not in turns and len(turns) < count:
                turns[text] = None
                progress(1)

    await _all(worker, concurrency)
    return [Prompt("self", text) for text in turns]


async def _all(worker: Callable[[], Coroutine[None, None, None]], count: int) -> None:
    """Run ``count`` workers to their end; when one fails the others are cancelled first, then its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(worker())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
