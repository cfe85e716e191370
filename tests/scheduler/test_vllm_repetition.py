"""vLLM's matcher does what ``scheduler.repetition`` asks of one."""

import numpy as np

from scheduler.vllm_repetition import NgramMatcher
from tests.scheduler.test_repetition import naive


def test_it_finds_what_a_plain_search_finds() -> None:
    matcher = NgramMatcher()
    match = matcher.wait()
    assert matcher() is match
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        text = rng.integers(0, 4, rng.integers(1, 40)).astype(np.int32)
        shortest = int(rng.integers(1, 5))
        longest = shortest + int(rng.integers(0, 6))
        count = int(rng.integers(1, 8))
        expected = naive(text, shortest, longest, count)
        np.testing.assert_array_equal(match(text, shortest, longest, count), expected)
        found += len(expected) > 0
    assert 50 < found < 300
