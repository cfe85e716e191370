from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scheduler.repetition import GrowingText, RepetitionDrafts, Tokens


class Clock:
    """Seconds that pass only when told to, and with every look at it if ``per_look`` is set."""

    def __init__(self, per_look: float = 0.0):
        self.now, self.per_look = 100.0, per_look

    def __call__(self) -> float:
        self.now += self.per_look
        return self.now


def naive(text: Tokens, shortest: int, longest: int, count: int) -> Tokens:
    """What followed the first time that the longest possible end of the text stood there."""
    for length in range(min(longest, len(text) - 1), shortest - 1, -1):
        for start in range(len(text) - length):
            if (text[start : start + length] == text[-length:]).all():
                return text[start + length :][:count]
    return text[:0]


def drafts(texts: dict[str, list[int]], limit: int = 4, **options: float) -> dict[str, list[int]]:
    source = RepetitionDrafts(lambda: naive, clock=Clock(), share=options.get("share", 1.0))
    found = source.drafts([GrowingText(name, tokens, limit) for name, tokens in texts.items()])
    return {name: repetition.token_ids for name, repetition in found.items()}


def test_what_followed_the_same_tokens_before_is_drafted() -> None:
    assert drafts({"a": [1, 2, 3, 4, 5, 9, 1, 2]}) == {"a": [3, 4, 5, 9]}


def test_the_limit_holds_and_nothing_is_searched_for_requests_that_allow_no_drafts() -> None:
    assert drafts({"a": [1, 2, 3, 4, 5, 9, 1, 2]}, limit=2) == {"a": [3, 4]}
    assert drafts({"a": [1, 2, 3, 4, 5, 9, 1, 2]}, limit=0) == {}


def test_text_that_does_not_repeat_itself_gives_no_draft() -> None:
    assert drafts({"a": [1, 2, 3, 4], "b": [7], "c": [5, 1, 2, 6, 1, 2]}) == {"c": [6, 1, 2]}


def test_longer_matches_promise_more() -> None:
    source = RepetitionDrafts(lambda: naive, clock=Clock(), share=1.0)
    texts = {"short": [1, 2, 3, 9, 8, 1, 2], "long": [*range(20), 50, *range(12)]}
    found = source.drafts([GrowingText(name, tokens, 3) for name, tokens in texts.items()])
    for repetition in found.values():
        assert len(repetition.survival) == len(repetition.token_ids) == 3
        assert repetition.survival == sorted(repetition.survival, reverse=True)
    assert found["long"].survival[0] > found["short"].survival[0]


def test_texts_grow_and_are_forgotten() -> None:
    rng = np.random.default_rng(0)
    source = RepetitionDrafts(lambda: naive, clock=Clock(), share=1.0)
    text = rng.integers(0, 8, 700).tolist()
    for length in (3, 200, 201, 256, 257, 600, 700):
        found = source.drafts([GrowingText("a", text[:length], 5)])
        assert found == drafts_of(text[:length])
        source.verified("a", 1)
    source.finished("a")
    source.finished("never seen")
    assert source.drafts([GrowingText("a", [4, 4, 4], 5)]) == drafts_of([4, 4, 4])


def drafts_of(text: list[int]) -> dict[str, object]:
    return dict(RepetitionDrafts(lambda: naive, clock=Clock(), share=1.0).drafts([GrowingText("a", text, 5)]))


def test_a_request_that_does_not_gain_is_searched_ever_less() -> None:
    source = RepetitionDrafts(lambda: naive, clock=Clock(), share=1.0)
    text = [1, 2, 3] * 30

    def searched(accepted: Callable[[int], int]) -> list[int]:
        lengths = []
        for length in range(10, 60):
            if source.drafts([GrowingText("a", text[:length], 5)]):
                lengths.append(length)
            source.verified("a", accepted(length))
        source.finished("a")
        return lengths

    assert searched(lambda length: 0) == [10, 12, 16, 24, 32, 40, 48, 56]
    assert searched(lambda length: int(length >= 24)) == [10, 12, 16, *range(24, 60)]
    # What is accepted of somebody else's draft is no gain.
    assert searched(lambda length: int(length % 2)) == [10, 12, 16, 24, 32, 40, 48, 56]


def test_without_a_matcher_nothing_is_proposed() -> None:
    assert RepetitionDrafts(lambda: None).drafts([GrowingText("a", [1, 1, 1, 1], 4)]) == {}


@pytest.mark.parametrize("requests", [1, 50])
def test_searching_takes_its_share_of_the_time_and_everybody_has_a_turn(requests: int) -> None:
    clock = Clock(per_look=0.001)  # every request looks at the clock once
    source = RepetitionDrafts(lambda: naive, clock=clock, share=0.05)
    searched: dict[str, int] = {}

    class Watched(list[int]):
        def __init__(self, name: str):
            super().__init__(range(5))
            self.name = name

        def __getitem__(self, index: Any) -> Any:
            searched[self.name] = searched.get(self.name, 0) + 1
            return super().__getitem__(index)

    texts = [GrowingText(f"r{i}", Watched(f"r{i}"), 4) for i in range(requests)]
    for _ in range(100):
        clock.now += 0.1
        before = sum(searched.values())
        source.drafts(texts)
        assert sum(searched.values()) - before <= 7
    assert len(searched) == requests
    assert max(searched.values()) - min(searched.values()) <= 2


def test_requests_that_repeat_themselves_come_first() -> None:
    clock = Clock()
    source = RepetitionDrafts(lambda: naive, clock=clock, share=0.05)
    texts = [GrowingText(f"r{i}", [i, i + 1, i + 2, i + 3], 4) for i in range(20)]
    texts.append(GrowingText("again", [1, 2, 3, 1, 2], 4))
    for _ in range(30):
        clock.now += 1
        clock.per_look = 0.0
        source.drafts(texts)
        source.verified("again", 1)
    clock.per_look = 0.01
    clock.now += 0.5
    assert list(source.drafts(texts)) == ["again"]
