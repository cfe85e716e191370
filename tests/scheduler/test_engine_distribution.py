"""Sampling with and without drafts draws from one distribution: chi-squared over 2 x 20,000 tokens, seeds fixed.

``test_engine_exactness`` asks for more, the very same tokens for the same seeds. Here the seeds of both sides differ,
so that the noise itself is tested: drafts that are drawn with it, and are trimmed by what they say, must not lean on
the answer.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.engine_server import EngineServer

_PREFIXES = (
    "The best way to spend an evening is",
    "In the year 1900 the city",
    "My favourite animal is the",
    "She opened the door and saw",
    "Water boils at",
    "def average(numbers):\n    ",
    "The capital of the country was moved to",
    "Yesterday the weather was",
    "A good teacher",
    "To bake bread you need",
)
_SAMPLES, _TOKENS, _AT_ONCE = 250, 8, 25
_LEAST_EXPECTED = 5.0

Sample = tuple[int, ...]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EngineServer]:
    """An engine that verifies at least one drafted token of every draft, and as many more as pay."""
    flags = ("--model.max_model_len=128", "--engine.max_num_seqs=8", "--speculation.min_draft_tokens=1")
    engine = EngineServer(tmp_path / "log", flags)
    try:
        yield engine.wait()
    finally:
        engine.stop()


def samples(server: EngineServer, prefix: str, first_seed: int, **body: object) -> list[Sample]:
    """Token ids of so many answers, each with a seed of its own."""

    def ask(seed: int) -> list[Sample]:
        response = server.post(
            "/v1/completions",
            {
                "prompt": prefix,
                "n": _AT_ONCE,
                "seed": seed,
                "temperature": 0.8,
                "max_tokens": _TOKENS,
                "ignore_eos": True,
                "return_token_ids": True,
                **body,
            },
        )
        response.raise_for_status()
        return [tuple(choice["token_ids"]) for choice in response.json()["choices"]]

    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(ask, range(first_seed, first_seed + _SAMPLES, _AT_ONCE))
        return [sample for part in parts for sample in part]


def statistic(left: list[Sample], right: list[Sample]) -> tuple[float, int]:
    """Chi-squared and its degrees of freedom: the next token behind every beginning that both sides share."""
    counts: dict[Sample, tuple[Counter[int], Counter[int]]] = defaultdict(lambda: (Counter(), Counter()))
    for side, drawn in enumerate((left, right)):
        for sample in drawn:
            for position in range(_TOKENS):
                counts[sample[:position]][side][sample[position]] += 1
    total, freedom = 0.0, 0
    for first, second in counts.values():
        chi, degrees = two_samples(first, second)
        total, freedom = total + chi, freedom + degrees
    return total, freedom


def two_samples(first: Counter[int], second: Counter[int]) -> tuple[float, int]:
    """Of one position; tokens that are too rare count as one."""
    sizes = first.total(), second.total()
    if not all(sizes):
        return 0.0, 0
    pooled: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for token in first.keys() | second.keys():
        both = first[token] + second[token]
        is_rare = both * min(sizes) / sum(sizes) < _LEAST_EXPECTED
        for side, count in enumerate((first[token], second[token])):
            pooled[-1 if is_rare else token][side] += count
    cells = [cell for cell in pooled.values() if sum(cell) * min(sizes) / sum(sizes) >= _LEAST_EXPECTED]
    if len(cells) < 2:
        return 0.0, 0
    # Rare tokens that together are too rare as well are left out, on both sides.
    sizes = sum(cell[0] for cell in cells), sum(cell[1] for cell in cells)
    chi = 0.0
    for cell in cells:
        for side in (0, 1):
            expected = sum(cell) * sizes[side] / sum(sizes)
            chi += (cell[side] - expected) ** 2 / expected
    return chi, len(cells) - 1


def chance(chi: float, freedom: int) -> float:
    """The probability of a statistic at least as large if both sides are drawn from one distribution."""
    halves = torch.tensor([freedom / 2, chi / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def test_the_statistic_tells_distributions_apart_and_equal_ones_not() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(weights: list[float]) -> list[Sample]:
        drawn = torch.multinomial(torch.tensor(weights), 2000 * _TOKENS, replacement=True, generator=generator)
        return [tuple(row) for row in drawn.view(2000, _TOKENS).tolist()]

    same, other = [0.5, 0.3, 0.2], [0.5, 0.2, 0.3]
    assert chance(*statistic(draw(same), draw(same))) > 0.01
    assert chance(*statistic(draw(same), draw(other))) < 1e-4


@pytest.mark.skipif(os.environ.get("SLIPSTREAM_TEST_FULL") != "1", reason="takes minutes; make test-full runs it")
@pytest.mark.timeout(3600)
def test_drafts_leave_the_distribution_alone(server: EngineServer) -> None:
    total, freedom, tokens = 0.0, 0, 0
    for number, prefix in enumerate(_PREFIXES):
        drafted = samples(server, prefix, 100_000 * number)
        plain = samples(server, prefix, 100_000 * number + 50_000, speculation={"max_draft_tokens": 0})
        chi, degrees = statistic(drafted, plain)
        total, freedom = total + chi, freedom + degrees
        tokens += sum(map(len, drafted))
    counted = server.speculation()["since_start"]
    assert tokens == 20_000
    assert freedom > 100
    assert counted["drafted_tokens"] > counted["verified_tokens"] > counted["accepted_tokens"] > 1_000, counted
    assert chance(total, freedom) > 0.001, (total, freedom)
