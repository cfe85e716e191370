import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter.align.collect import CollectOptions, Written, collect, plan_answers, write_own_prompts
from drafter.align.corpus import Answer, AnswerId, ShardWriter, recorded_ids
from drafter.align.prompts import OWN_SUBJECTS, Prompt, Turn

PROMPTS = [Prompt("chat" if i % 3 else "math", f"prompt {i}") for i in range(12)]


class FakeEngine:
    """Answers ten tokens to everything, recording into ``folder`` as the real one does when it is flushed."""

    def __init__(self, folder: Path, fail: Callable[[str], bool] = lambda request_id: False):
        self.asked: list[tuple[str, tuple[Turn, ...], float, int, int]] = []
        self.running = self.most_running = self.flushes = 0
        self.running_at_flush: list[int] = []
        self.turns: list[tuple[str, tuple[Turn, ...], float, int, int]] = []
        self._writer, self._fail = ShardWriter(folder), fail

    async def answer(
        self, request_id: str, turns: Sequence[Turn], temperature: float, max_tokens: int, seed: int
    ) -> Written:
        self.asked.append((request_id, tuple(turns), temperature, max_tokens, seed))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for _ in range(2):
                await asyncio.sleep(0)
            if self._fail(request_id):
                raise ConnectionError("the engine died")
            for _ in range(2):
                await asyncio.sleep(0)
        finally:
            self.running -= 1
        self._writer.add(Answer(AnswerId.parse(request_id), 1, torch.arange(11), {1: torch.zeros(11, 2)}))
        return Written(f"answer of {request_id}", 10)

    async def user_turn(
        self, request_id: str, turns: Sequence[Turn], temperature: float, max_tokens: int, seed: int
    ) -> str:
        self.turns.append((request_id, tuple(turns), temperature, max_tokens, seed))
        await asyncio.sleep(0)
        return ["Hi", f"What is {seed} plus {seed // 2}?", "Where do the cats live?", f"Tell me about {seed}"][seed % 4]

    async def flush(self) -> None:
        self.flushes += 1
        self.running_at_flush.append(self.running)
        await asyncio.sleep(0)
        self._writer.flush()


def options(folder: Path, target_tokens: int = 10**6, concurrency: int = 3) -> CollectOptions:
    return CollectOptions(
        folder,
        temperatures=(0.0,),
        held_out_temperatures=(0.0,),
        follow_ups=0,
        target_tokens=target_tokens,
        concurrency=concurrency,
        max_answer_tokens=64,
    )


def run(engine: FakeEngine, chosen: CollectOptions) -> tuple[int, list[int]]:
    seen: list[int] = []
    return asyncio.run(collect(engine, PROMPTS, chosen, seen.append)), seen


def test_the_plan_is_every_prompt_at_every_temperature_and_all_prompts_once_first(tmp_path: Path) -> None:
    prompts = [Prompt("chat", f"prompt {i}") for i in range(45)]
    plan = plan_answers(prompts, CollectOptions(tmp_path))
    assert len({str(answer) for answer in plan}) == len(plan) == 90
    for half in (plan[:45], plan[45:]):
        assert sorted(answer.prompt_index for answer in half) == list(range(45))
    assert {answer.temperature for answer in plan[:45]} == {0.0, 0.7}
    held_out = {answer for answer in plan if answer.prompt_index in (0, 40)}
    assert {answer.temperature for answer in held_out} == {0.0, 1.0}
    assert {answer.temperature for answer in plan if answer not in held_out} == {0.0, 0.7}


def test_what_is_asked_twice_is_answered_once(tmp_path: Path) -> None:
    prompts = [Prompt("a", "Who is it?"), Prompt("b", "Why?"), Prompt("c", "who  is IT?")]
    assert {answer.prompt_index for answer in plan_answers(prompts, options(tmp_path))} == {0, 1}


def test_the_order_is_shuffled_by_the_seed_alone(tmp_path: Path) -> None:
    plan = plan_answers(PROMPTS, options(tmp_path))
    assert plan == plan_answers(PROMPTS, options(tmp_path / "elsewhere"))
    assert [answer.prompt_index for answer in plan] != list(range(12))
    assert plan != plan_answers(PROMPTS, replace(options(tmp_path), seed=1))


def test_every_prompt_is_answered(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path)
    assert run(engine, options(tmp_path)) == (120, [10] * 12)
    assert engine.flushes == 1 and engine.most_running == 3
    assert recorded_ids(tmp_path) == {str(answer) for answer in plan_answers(PROMPTS, options(tmp_path / "empty"))}
    for request_id, *asked in engine.asked:
        answer = AnswerId.parse(request_id)
        assert asked == [PROMPTS[answer.prompt_index].turns, answer.temperature, 64, answer.seed]


def test_two_runs_ask_in_the_same_order(tmp_path: Path) -> None:
    engines = [FakeEngine(tmp_path / name) for name in "ab"]
    for engine, name in zip(engines, "ab", strict=True):
        run(engine, options(tmp_path / name))
    assert engines[0].asked == engines[1].asked


def test_collecting_stops_at_the_target(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path)
    written, _ = run(engine, options(tmp_path, target_tokens=50, concurrency=1))
    assert written == 50 and len(engine.asked) == 5


def test_requests_in_flight_at_the_target_are_finished(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path)
    written, seen = run(engine, options(tmp_path, target_tokens=50, concurrency=4))
    assert 50 <= written < 50 + 4 * 10 and written == sum(seen)
    assert len(recorded_ids(tmp_path)) == len(engine.asked) == written // 10


def test_a_second_run_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    first = FakeEngine(tmp_path)
    run(first, options(tmp_path, target_tokens=50, concurrency=1))
    second = FakeEngine(tmp_path)
    assert run(second, options(tmp_path))[0] == 70
    whole = FakeEngine(tmp_path / "whole")
    run(whole, options(tmp_path / "whole"))
    assert first.asked + second.asked == whole.asked
    third = FakeEngine(tmp_path)
    assert run(third, options(tmp_path)) == (0, []) and third.asked == []


@pytest.mark.parametrize("concurrency", [1, 3])
def test_what_was_finished_is_flushed_when_the_engine_fails(tmp_path: Path, concurrency: int) -> None:
    chosen = options(tmp_path, concurrency=concurrency)
    broken = plan_answers(PROMPTS, chosen)[4]
    engine = FakeEngine(tmp_path, fail=lambda request_id: request_id == str(broken))
    with pytest.raises(ConnectionError, match="the engine died"):
        run(engine, chosen)
    assert engine.flushes == 1
    finished = {request_id for request_id, *_ in engine.asked[:3]}
    assert finished <= recorded_ids(tmp_path) and str(broken) not in recorded_ids(tmp_path)


def test_nothing_is_running_any_more_when_a_failed_run_is_flushed(tmp_path: Path) -> None:
    chosen = options(tmp_path)
    broken = plan_answers(PROMPTS, chosen)[3]
    engine = FakeEngine(tmp_path, fail=lambda request_id: request_id == str(broken))
    with pytest.raises(ConnectionError, match="the engine died"):
        run(engine, chosen)
    assert engine.running_at_flush == [0]


def test_what_was_finished_is_flushed_when_the_run_is_cancelled(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path)

    async def cancelled() -> None:
        task = asyncio.create_task(collect(engine, PROMPTS, options(tmp_path), lambda tokens: None))
        while len(engine.asked) < 5:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert engine.running_at_flush == [0]
    assert recorded_ids(tmp_path) == {request_id for request_id, *_ in engine.asked[:3]}


def test_some_conversations_go_on(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path)
    written, seen = run(engine, replace(options(tmp_path, concurrency=1), follow_ups=0.5))
    assert len(engine.turns) == 6 and written == sum(seen)
    continued = [asked for asked in engine.asked if AnswerId.parse(asked[0]).turn]
    assert 3 <= len(continued) < 6  # what was too short to ask anything was left
    for request_id, turns, *_ in continued:
        first = replace(AnswerId.parse(request_id), turn=0)
        begun = (*PROMPTS[first.prompt_index].turns, Turn("assistant", f"answer of {first}"))
        assert turns[:-1] == begun and turns[-1].role == "user"
        assert (f"turn-{first}".replace("/", "."), begun, 1.0, 96, first.seed) in engine.turns
    assert len(recorded_ids(tmp_path)) == 12 + len(continued)


def own_prompts(engine: FakeEngine, count: int, seed: int = 0, concurrency: int = 2) -> tuple[list[Prompt], list[int]]:
    seen: list[int] = []
    return asyncio.run(write_own_prompts(engine, count, seed, concurrency, seen.append)), seen


def test_the_target_writes_prompts_that_are_usable_and_different(tmp_path: Path) -> None:
    prompts, seen = own_prompts(FakeEngine(tmp_path), 5)
    texts = ("What is 1 plus 0?", "Where do the cats live?", "Tell me about 3", "What is 5 plus 2?", "Tell me about 7")
    assert tuple(prompt.text for prompt in prompts) == texts
    assert [(prompt.category, prompt.system) for prompt in prompts] == [OWN_SUBJECTS[i] for i in (1, 2, 3, 5, 7)]
    assert seen == [1] * 5


def test_every_attempt_has_its_own_seed_and_subjects_take_turns(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path)
    own_prompts(engine, 10, seed=40, concurrency=1)
    assert [turn[0] for turn in engine.turns] == [f"turn-{i}" for i in range(len(engine.turns))]
    assert [turn[2:] for turn in engine.turns] == [(1.0, 96, 40 + i) for i in range(len(engine.turns))]
    systems = [turn[1] for turn in engine.turns[: len(OWN_SUBJECTS)]]
    assert systems == [() if system is None else (Turn("system", system),) for _, system in OWN_SUBJECTS]


def test_writing_prompts_gives_up_on_a_rambling_target(tmp_path: Path) -> None:
    class Rambling(FakeEngine):
        async def user_turn(self, *arguments: Any, **more: Any) -> str:
            await super().user_turn(*arguments, **more)
            return "yes yes yes yes yes"

    engine = Rambling(tmp_path)
    assert own_prompts(engine, 3, concurrency=5) == ([], [])
    assert len(engine.turns) == 12


def test_no_more_prompts_than_asked_for_come_from_many_workers(tmp_path: Path) -> None:
    prompts, seen = own_prompts(FakeEngine(tmp_path), 3, concurrency=16)
    assert len(prompts) == 3 and seen == [1] * 3
