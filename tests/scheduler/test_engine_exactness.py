"""The promise, on the real engine: with the drafter the target says what it says without, token for token."""

from collections.abc import Sequence

import pytest
import torch

from scheduler.noise import gumbel_noise
from tests.engine_server import Completion, EngineServer

_NEAR_TIE = 1e-4  # nats between the two likeliest tokens: below it the batch's shape may decide

_SUBJECTS = ("a lighthouse", "the ocean", "a small dog", "the moon", "an old clock", "a train", "the forest", "bread")
_TASKS = (
    "Write a short story about {}.",
    "List five facts about {}.",
    "Explain to a child what {} is.",
    "Write a Python function that counts how often the words of a text name {}.",
    "If {} costs 12 dollars and I buy 7 of them, how much do I pay? Show each step.",
)
_BACKGROUND = " ".join(
    f"Note {number}: the archive keeps records of weather, trade and travel for the year {1800 + number}."
    for number in range(9)
)


def _chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def _prompts() -> list[str]:
    """Forty prompts; every fourth begins with the same long text, which is read in chunks and then found cached."""
    texts = [task.format(subject) for subject in _SUBJECTS for task in _TASKS]
    return [_chat(f"{_BACKGROUND} {text}" if i % 4 == 0 else text) for i, text in enumerate(texts)]


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Position of the first token that differs, ``None`` for equal sequences."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))


def _gap(completion: Completion, position: int) -> float:
    best, second = sorted(completion.top_logprobs[position].values(), reverse=True)[:2]
    return best - second


@pytest.fixture(scope="module")
def plain_answers(plain_server: EngineServer) -> list[Completion]:
    """What plain decoding says to the prompts, one request at a time."""
    return plain_server.complete_all(_prompts(), concurrency=1)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_greedy_output_is_that_of_plain_decoding(
    concurrency: int, drafting_server: EngineServer, plain_answers: list[Completion]
) -> None:
    prompts = _prompts()
    assert len(prompts) >= 40
    before = drafting_server.speculation()["since_start"]["accepted_tokens"]

    drafted = drafting_server.complete_all(prompts, concurrency)

    near_ties = []
    for prompt, plain, other in zip(prompts, plain_answers, drafted, strict=True):
        position = _first_difference(plain.token_ids, other.token_ids)
        if position is not None:
            near_ties.append((_gap(plain, position), prompt[-80:], position))
    print(f"concurrency {concurrency}: {len(near_ties)} of {len(prompts)} answers part at a near tie: {near_ties}")
    assert [tie for tie in near_ties if tie[0] > _NEAR_TIE] == []
    # What is compared must have gone through the paths that could break it.
    assert drafting_server.speculation()["since_start"]["accepted_tokens"] > before
    assert drafting_server.metric("vllm:prefix_cache_hits_total") > 0
    if concurrency > 1:
        assert drafting_server.metric("vllm:num_preemptions_total") > 0


def test_seeded_samples_are_those_of_plain_decoding(drafting_server: EngineServer, plain_server: EngineServer) -> None:
    prompts = _prompts()[1:13:2]
    options = {"temperature": 0.8, "seed": 1234, "max_tokens": 24, "logprobs": 5}
    plain = [plain_server.complete(prompt, **options) for prompt in prompts]
    drafted = drafting_server.complete_all(prompts, concurrency=3, **options)

    for prompt, one, other in zip(prompts, plain, drafted, strict=True):
        position = _first_difference(one.token_ids, other.token_ids)
        if position is None:
            continue
        # Both tokens were within a hair of being drawn: recompute what was compared, noise included.
        prompt_len = len(plain_server.post("/tokenize", {"prompt": prompt}).json()["tokens"])
        noise = gumbel_noise(torch.tensor([1234]), torch.tensor([prompt_len + position]), 49152)[0]
        both = [one.token_ids[position], other.token_ids[position]]
        names = [plain_server.post("/detokenize", {"tokens": [t]}).json()["prompt"] for t in both]
        scores = [
            one.top_logprobs[position][name] / 0.8 + float(noise[token])
            for name, token in zip(names, both, strict=True)
        ]
        assert abs(scores[0] - scores[1]) < 10 * _NEAR_TIE, (prompt[-60:], position, names, scores)
    assert len({completion.text for completion in plain}) == len(prompts)


def test_a_seed_gives_the_same_text_again_and_another_seed_another(drafting_server: EngineServer) -> None:
    def sample(seed: int) -> str:
        return drafting_server.complete(_chat("Invent a name."), temperature=1.0, seed=seed, max_tokens=16).text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(1, 5)}) > 1
