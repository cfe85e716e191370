from collections import Counter

from bench.plan import Cell, measuring_order, seconds_left

METHODS = ("vllm", "ar", "slipstream")


def test_every_cell_is_measured_once_and_methods_alternate() -> None:
    order = measuring_order(4, (1, 4), ("math", "chat"), METHODS, seed=1)
    assert len(order) == len(set(order)) == 4 * 2 * 2 * 3
    blocks = [order[start : start + 3] for start in range(0, len(order), 3)]
    for block in blocks:
        assert {cell.method for cell in block} == set(METHODS)
        assert len({(cell.repeat, cell.concurrency, cell.category) for cell in block}) == 1
    assert [(block[0].repeat, block[0].concurrency, block[0].category) for block in blocks[:5]] == [
        (0, 1, "math"),
        (0, 1, "chat"),
        (0, 4, "math"),
        (0, 4, "chat"),
        (1, 1, "math"),
    ]


def test_the_order_inside_of_a_block_changes_and_depends_on_the_seed_only() -> None:
    order = measuring_order(20, (1,), ("math",), METHODS, seed=1)
    firsts = Counter(cell.method for cell in order[::3])
    assert set(firsts) == set(METHODS)
    assert order == measuring_order(20, (1,), ("math",), METHODS, seed=1)
    assert order != measuring_order(20, (1,), ("math",), METHODS, seed=2)


def test_time_left_uses_the_most_similar_cells() -> None:
    measured = [
        (Cell(0, 1, "math", "ar"), 10.0),
        (Cell(0, 1, "chat", "ar"), 20.0),
        (Cell(0, 1, "math", "vllm"), 30.0),
    ]
    assert seconds_left(measured, [Cell(1, 1, "math", "ar")]) == 15.0
    assert seconds_left(measured, [Cell(1, 1, "math", "new")]) == 20.0  # all of the same concurrency
    assert seconds_left(measured, [Cell(1, 4, "math", "ar")]) == 20.0  # all there is
    assert seconds_left(measured, [Cell(1, 1, "math", "ar"), Cell(1, 1, "math", "vllm")]) == 45.0
    assert seconds_left(measured, []) == 0.0


def test_time_left_is_unknown_before_the_first_measurement() -> None:
    assert seconds_left([], [Cell(0, 1, "math", "ar")]) is None
