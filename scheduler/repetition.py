"""Draft tokens for nothing, where a request's text repeats itself; numpy only, no engine needed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

# Lengths of matches, from longest to shortest, and how likely the next token is to follow again. These are only where
# the acceptance model starts from; what it learns on top is a slope and an intercept per slot.
_LEVELS = (((9, 16), 0.95), ((4, 8), 0.8), ((2, 3), 0.5))
_FIRST_ROOM = 256  # tokens
_SHARE = 0.02
_FIRST_PAUSE, _LONGEST_PAUSE = 2, 8  # tokens


class Matcher(Protocol):
    """Looks for the first place where the end of a text, as much of it as possible, stood before."""

    def __call__(self, text: Tokens, shortest: int, longest: int, count: int) -> Tokens:
        """At most ``count`` tokens that followed there; none if no match of ``shortest`` to ``longest`` tokens is."""
        ...


@dataclass(frozen=True, slots=True)
class Repetition:
    """A draft from a request's own text.

    Attributes:
        token_ids: that followed the same tokens before.
        survival: of each, the probability that it and all before it are accepted, as a first guess.
    """

    token_ids: list[int]
    survival: list[float]


NO_REPETITION = Repetition([], [])


@dataclass(frozen=True, slots=True)
class GrowingText:
    """A request's prompt and answer so far, and the most draft tokens that it can still use."""

    request_id: str
    token_ids: Sequence[int]
    limit: int


class RepetitionDrafts:
    """Proposes what followed when a request's latest tokens stood in its prompt or answer before.

    Nobody else's text is looked at. To search takes time in proportion to all text, and so does to weigh what was
    found. So it gets a small part of the time between two calls: requests that gained by it last time are first, then
    those that waited longest; and a request that did not gain has to grow for ever longer before it is searched again.

    Args:
        matcher: gives the function that searches, or ``None`` as long as there is none.
        share: that part.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        matcher: Callable[[], Matcher | None],
        share: float = _SHARE,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._matcher, self._share, self._clock = matcher, share, clock
        self._texts: dict[str, _Text] = {}
        self._called = clock()

    def drafts(self, texts: Sequence[GrowingText]) -> dict[str, Repetition]:
        """Drafts of the requests that repeat themselves, by request."""
        now = self._clock()
        end, self._called = now + self._share * (now - self._called), now
        matcher = self._matcher()
        if matcher is None:
            return {}
        found: dict[str, Repetition] = {}
        known = [(self._texts.setdefault(text.request_id, _Text()), text) for text in texts if text.limit > 0]
        for kept, text in sorted(known, key=lambda pair: pair[0].searched):
            if self._clock() > end:
                break
            if kept.is_due(len(text.token_ids)) and (repetition := kept.search(matcher, text, now)):
                found[text.request_id] = repetition
        return found

    def verified(self, request_id: str, accepted: int) -> None:
        """A step accepted so many draft tokens of a request, whosever they were; unknown requests are ignored."""
        if text := self._texts.get(request_id):
            text.verified(accepted)

    def finished(self, request_id: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._texts.pop(request_id, None)


class _Text:
    """A text that grows, in one array."""

    __slots__ = ("_array", "_found", "_length", "_pause", "searched")

    def __init__(self) -> None:
        self._array: Tokens = np.empty(_FIRST_ROOM, dtype=np.int32)
        self._length = 0
        self._pause = 0
        self._found = False
        self.searched = 0.0  # when it was searched in vain; 0 if it was not

    def is_due(self, length: int) -> bool:
        """Whether to search: with every search in vain it has to grow by more tokens before the next one."""
        return length >= self._length + self._pause

    def search(self, matcher: Matcher, text: GrowingText, now: float) -> Repetition | None:
        self._follow(text.token_ids)
        found = self._find(matcher, text.limit)
        self._found = found is not None
        # In vain until something of it is accepted.
        self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
        self.searched = now
        return found

    def verified(self, accepted: int) -> None:
        if self._found and accepted:
            self._pause, self.searched = 0, 0.0
        self._found = False

    def _find(self, matcher: Matcher, limit: int) -> Repetition | None:
        for (shortest, longest), probability in _LEVELS:
            tokens = matcher(self._array[: self._length], shortest, longest, limit)
            if len(tokens):
                survival = np.cumprod(np.full(len(tokens), probability))
                return Repetition(tokens.tolist(), survival.tolist())
        return None

    def _follow(self, token_ids: Sequence[int]) -> None:
        """Take over what was added."""
        size = len(token_ids)
        if size > len(self._array):
            grown = np.empty(max(size, 2 * len(self._array)), dtype=np.int32)
            grown[: self._length] = self._array[: self._length]
            self._array = grown
        self._array[self._length : size] = token_ids[self._length : size]
        self._length = size
