"""The promise, on the real engine: with the drafter the target says what it says without, token for token."""

import pytest

from cuda_ext import ops
from tests.engine_server import Completion, EngineServer, SharedServer

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

needs_kernels = pytest.mark.skipif(
    not ops.kernels().cpu_compiled,
    reason=f"vLLM's own layers, which round by the shape of the batch, run where ours do not: {ops.kernels().cpu}",
)


def _chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def _prompts() -> list[str]:
    """Forty prompts; every fourth begins with the same long text, which is read in chunks and then found cached."""
    texts = [task.format(subject) for subject in _SUBJECTS for task in _TASKS]
    return [_chat(f"{_BACKGROUND} {text}" if i % 4 == 0 else text) for i, text in enumerate(texts)]


def _ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module")
def plain_answers(shared_plain_server: SharedServer) -> list[Completion]:
    """What plain decoding says to the prompts, one request at a time."""
    return shared_plain_server.running().complete_all(_prompts(), concurrency=1)


@needs_kernels
@pytest.mark.parametrize("concurrency", [1, 8])
def test_greedy_output_is_that_of_plain_decoding(
    concurrency: int, drafting_server: EngineServer, plain_answers: list[Completion]
) -> None:
    prompts = _prompts()
    assert len(prompts) >= 40
    before = drafting_server.speculation()["since_start"]["accepted_tokens"]

    drafted = drafting_server.complete_all(prompts, concurrency)

    assert _ids(drafted) == _ids(plain_answers)
    # What is compared must have gone through the paths that could break it.
    assert drafting_server.speculation()["since_start"]["accepted_tokens"] > before
    assert drafting_server.metric("vllm:prefix_cache_hits_total") > 0
    if concurrency > 1:
        assert drafting_server.metric("vllm:num_preemptions_total") > 0


@needs_kernels
def test_seeded_samples_are_those_of_plain_decoding(drafting_server: EngineServer, plain_server: EngineServer) -> None:
    prompts = _prompts()[1:13:2]
    options = {"temperature": 0.8, "seed": 1234, "max_tokens": 24}
    plain = [plain_server.complete(prompt, **options) for prompt in prompts]
    drafted = drafting_server.complete_all(prompts, concurrency=3, **options)

    assert _ids(drafted) == _ids(plain)
    assert len({completion.text for completion in plain}) == len(prompts)


def test_a_seed_gives_the_same_text_again_and_another_seed_another(drafting_server: EngineServer) -> None:
    def sample(seed: int) -> str:
        return drafting_server.complete(_chat("Invent a name."), temperature=1.0, seed=seed, max_tokens=16).text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(1, 5)}) > 1
