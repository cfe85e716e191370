"""Products with packed weights, against float64, and their independence of everything else."""

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext import ops, reference
from cuda_ext.linear import PackedWeight, WeightFormat, pack, unpack
from tests.cuda_ext.oracle import instruction_set, threads
from tests.cuda_ext.weights import FORMATS, make, numbers, packed, source

ROWS = (*range(1, 18), 33, 64, 70)


def arguments(x: torch.Tensor, weight: PackedWeight) -> tuple[Any, ...]:
    return x, weight.panels, weight.scales, weight.out_features, weight.format.value


def product(operations: ModuleType, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    result: torch.Tensor = operations.linear(*arguments(x, weight))
    return result


def check(operations: ModuleType, x: torch.Tensor, weight: PackedWeight) -> None:
    """No further from the float64 product than a float32 sum of so many numbers can be, in whatever order."""
    actual = product(operations, x, weight)
    assert actual.dtype == torch.float32 and actual.shape == (len(x), weight.out_features)
    wide = unpack(weight).double()
    bound = (weight.in_features + 4) * 2**-24 * (x.double().abs() @ wide.abs().T)
    assert bool(((actual.double() - x.double() @ wide.T).abs() <= bound).all())


@pytest.mark.parametrize(
    ("out", "inputs"), [(1, 1), (15, 31), (16, 32), (17, 33), (50, 129), (100, 576), (130, 7), (260, 300)]
)
@pytest.mark.parametrize("format", FORMATS)
def test_formats_and_shapes(operations: ModuleType, format: WeightFormat, out: int, inputs: int) -> None:
    weight = make(format, out, inputs)
    for rows in (1, 2, 4, 5, 8, 9, 16, 70):
        check(operations, numbers(rows, weight.in_features), weight)


@pytest.mark.parametrize("format", FORMATS)
def test_any_number_of_rows(operations: ModuleType, format: WeightFormat) -> None:
    weight = make(format, 50, 150)
    for rows in range(1, 71):
        check(operations, numbers(rows, weight.in_features), weight)


@settings(max_examples=200, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    out=st.integers(1, 150),
    inputs=st.integers(1, 300),
    rows=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_any_case(
    instruction_sets: list[str], format: WeightFormat, out: int, inputs: int, rows: int, seed: int
) -> None:
    weight = make(format, out, inputs, seed)
    x = numbers(rows, weight.in_features, seed=seed)
    check(reference, x, weight)
    check(ops, x, weight)
    for name in instruction_sets:
        with instruction_set(name):
            check(ops, x, weight)


@pytest.mark.parametrize("format", FORMATS)
def test_no_rows(operations: ModuleType, format: WeightFormat) -> None:
    assert product(operations, torch.zeros(0, 32), make(format, 17, 32)).shape == (0, 17)


@pytest.mark.parametrize("format", FORMATS)
def test_what_one_row_holds_stays_in_that_row(operations: ModuleType, format: WeightFormat) -> None:
    weight = make(format, 40, 160)
    x = numbers(9, weight.in_features)
    x[4] = torch.nan
    result = product(operations, x, weight)
    assert bool(result[4].isnan().all())
    assert bool(result[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all())


@pytest.mark.parametrize("format", FORMATS)
def test_the_arguments_stay_as_they_are(operations: ModuleType, format: WeightFormat) -> None:
    weight = make(format, 40, 160)
    arguments_ = [argument for argument in arguments(numbers(9, 160), weight) if isinstance(argument, torch.Tensor)]
    before = [tensor.clone() for tensor in arguments_]
    product(operations, arguments_[0], weight)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(arguments_, before, strict=True))


# A token must not depend on who else is served: from here on it is about equal bits.


@pytest.fixture(scope="module", params=FORMATS)
def rows_of_weight(request: pytest.FixtureRequest) -> tuple[WeightFormat, torch.Tensor]:
    """A format and what to pack in it, large enough for two threads to have a share each."""
    return request.param, source(request.param, 300, 421)


Source = tuple[WeightFormat, torch.Tensor]


@pytest.mark.parametrize("count", [1, 2])
def test_neighbours_places_and_threads_do_not_matter(compiled: ModuleType, rows_of_weight: Source, count: int) -> None:
    weight = packed(*rows_of_weight)
    x = numbers(max(ROWS), weight.in_features)
    whole = product(compiled, x, weight)
    with threads(count):
        for rows in ROWS:
            for start in {0, 5, len(x) - rows}:
                part = x[start : start + rows].contiguous()
                assert torch.equal(product(compiled, part, weight), whole[start : start + rows]), (rows, start)


def test_the_same_again(compiled: ModuleType, rows_of_weight: Source) -> None:
    weight = packed(*rows_of_weight)
    x = numbers(9, weight.in_features)
    assert torch.equal(product(compiled, x, weight), product(compiled, x, weight))


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_other_outputs_do_not_matter(compiled: ModuleType, rows_of_weight: Source, rows: int) -> None:
    format, whole = rows_of_weight
    weight = packed(format, whole)
    x = numbers(rows, weight.in_features)
    expected = product(compiled, x, weight)
    for first, last in ((0, 1), (0, 16), (3, 20), (16, 64), (1, 100), (40, 300)):
        part = packed(format, whole[first:last])
        assert torch.equal(product(compiled, x, part), expected[:, first:last]), (first, last)


@pytest.mark.parametrize("format", [format for format in FORMATS if format is not WeightFormat.INT8])
@pytest.mark.parametrize("rows", [1, 4, 7, 8, 33])
def test_small_formats_are_the_float32_kernel_on_the_same_numbers(
    compiled: ModuleType, format: WeightFormat, rows: int
) -> None:
    """Not int8, whose scale is applied to the sum."""
    weight = make(format, 300, 421)
    x = numbers(rows, weight.in_features)
    assert torch.equal(product(compiled, x, weight), product(compiled, x, pack(unpack(weight))))


@pytest.mark.parametrize("name", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("rows", [2, 20])
def test_sums_are_taken_in_the_order_of_the_inputs(
    instruction_sets: list[str], rows_of_weight: Source, name: str, rows: int
) -> None:
    if name not in instruction_sets:
        pytest.skip(f"no kernels for {name} here")
    weight = packed(*rows_of_weight)
    columns = unpack(weight)
    if weight.scales is not None:
        columns = (columns / weight.scales[:300, None]).round()
    x = numbers(rows, weight.in_features)
    sums = torch.zeros(rows, 300)
    for k in range(weight.in_features):
        # Exact in float64; without a fused instruction it is rounded before it is added.
        term = x[:, k, None].double() * columns[:, k].double()
        sums = (sums.double() + (term.float().double() if name == "scalar" else term)).float()
    with instruction_set(name):
        expected = sums if weight.scales is None else sums * weight.scales[:300]
        assert torch.equal(product(ops, x, weight), expected)


# Arguments


@pytest.mark.parametrize("format", FORMATS)
def test_the_operator_keeps_to_its_schema_and_its_fake_kernel(format: WeightFormat) -> None:
    torch.library.opcheck(ops.linear, arguments(numbers(3, 32), make(format, 17, 32)))


X = numbers(3, 32)
PANELS = pack(numbers(17, 32)).panels
QUARTERS = pack(numbers(17, 32), WeightFormat.INT8)


@pytest.mark.parametrize(
    ("name", "arguments_"),
    [
        ("input", (X[0], PANELS, None, 17, "float32")),
        ("input", (X.double(), PANELS, None, 17, "float32")),
        ("input", (numbers(32, 3).T, PANELS, None, 17, "float32")),
        ("input is 33 wide", (numbers(3, 33), PANELS, None, 17, "q8_0")),
        ("input is 48 wide", (numbers(3, 48), PANELS, None, 17, "q4_1")),
        ("panels", (X, PANELS.view(2, -1), None, 17, "float32")),
        ("panels", (X, PANELS.view(torch.int8), None, 17, "float32")),
        ("panels", (X, PANELS[:-1], None, 17, "float32")),
        ("panels", (X, torch.cat([PANELS, PANELS])[::2], None, 17, "float32")),
        ("panels", (X, PANELS, None, 33, "float32")),
        ("panels", (X, PANELS, None, 16, "float32")),
        ("panels", (X, PANELS, None, 0, "float32")),
        ("panels", (X, PANELS[:0], None, -1, "float32")),
        ("panels", (numbers(3, 31), PANELS, None, 17, "float32")),
        ("panels", (X, PANELS, None, 17, "bfloat16")),
        ("panels", (X, PANELS, None, 17, "q4_1")),
        ("scales is given", (X, PANELS, QUARTERS.scales, 17, "float32")),
        ("scales is missing", (X, QUARTERS.panels, None, 17, "int8")),
        ("scales", (X, QUARTERS.panels, torch.ones(17), 17, "int8")),
        ("scales", (X, QUARTERS.panels, torch.ones(32).double(), 17, "int8")),
        ("format is float8", (X, PANELS, None, 17, "float8")),
    ],
)
def test_wrong_arguments_are_named(compiled: ModuleType, name: str, arguments_: tuple[Any, ...]) -> None:
    with pytest.raises(RuntimeError, match=name):
        compiled.linear(*arguments_)


def test_a_refusal_says_what_was_arguments_and_what_was_expected(compiled: ModuleType) -> None:
    with pytest.raises(
        RuntimeError, match="panels has 4095 bytes, expected 4096 for 17 outputs of 32 inputs in float32"
    ):
        compiled.linear(X, PANELS[:-1], None, 17, "float32")
