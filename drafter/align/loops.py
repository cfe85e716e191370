"""Telling where a text begins to repeat itself without end, as small models' answers do; pure."""

from collections.abc import Sequence

_LONGEST_PERIOD = 48  # tokens
_REPEATS, _LEAST = 4, 32  # a loop is so many repetitions, and at least so many tokens


def loop_start(tokens: Sequence[int]) -> int | None:
    """Where the first repetition of the loop at the end of a text begins, or ``None`` if it does not end in one.

    Everything before is worth keeping: what stands there is said for the first time.
    """
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) // 2) + 1):
        length = _repeated(tokens, period)
        if length + period >= max(_REPEATS * period, _LEAST):
            return len(tokens) - length
    return None


def _repeated(tokens: Sequence[int], period: int) -> int:
    """How many tokens at the end are the same as those a period before them."""
    length = 0
    while length < len(tokens) - period and tokens[-1 - length] == tokens[-1 - length - period]:
        length += 1
    return length
