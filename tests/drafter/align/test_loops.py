import pytest

from drafter.align.loops import loop_start


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ([], None),
        ([1], None),
        ([7] * 31, None),
        ([7] * 32, 1),
        ([1, 2, *[7] * 40], 3),
        ([1, 2, 3, *[4, 5] * 16], 5),
        ([1, 2, 3, *[4, 5] * 16, 4], 5),
        ([1, 2, 3, *[4, 5] * 16, 9], None),
        ([9, *list(range(20)) * 3], None),
        ([9, *list(range(20)) * 4], 21),
        (list(range(40)) * 4, 40),
        (list(range(60)) * 4, None),
        (list(range(100)), None),
    ],
)
def test_a_loop_is_what_ends_a_text_four_times_over(text: list[int], start: int | None) -> None:
    assert loop_start(text) == start
