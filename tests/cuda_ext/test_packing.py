"""What packed weights stand for, and finding the smallest format that holds the same numbers."""

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_ext.linear import BLOCK, WeightFormat, pack, pack_blocks, pack_exactly, unpack
from tests.cuda_ext.oracle import threads
from tests.cuda_ext.weights import BLOCK_BYTES, BLOCKED, DENSE, numbers, source


@pytest.mark.parametrize(("out", "inputs"), [(1, 1), (16, 32), (17, 33), (100, 70)])
@pytest.mark.parametrize("format", DENSE)
def test_dense_formats_round_each_number(format: WeightFormat, out: int, inputs: int) -> None:
    weight = numbers(out, inputs)
    stored = pack(weight, format)
    assert (stored.format, stored.out_features, stored.in_features) == (format, out, inputs)
    assert torch.equal(unpack(stored), weight.to(DENSE[format]).float())
    assert stored.num_bytes == -(-out // 16) * 16 * inputs * DENSE[format].itemsize


@pytest.mark.parametrize("dtype", DENSE.values())
def test_weights_of_any_dtype_and_layout_are_packed(dtype: torch.dtype) -> None:
    weight = numbers(33, 20).to(dtype).T
    assert torch.equal(unpack(pack(weight)), weight.float())
    parameter = torch.nn.Parameter(numbers(3, 4))
    assert not pack(parameter).panels.requires_grad


@pytest.mark.parametrize("format", BLOCKED)
@pytest.mark.parametrize(("out", "inputs"), [(1, 32), (16, 64), (37, 160)])
def test_blocks_are_what_gguf_reads_from_them(format: WeightFormat, out: int, inputs: int) -> None:
    blocks = source(format, out, inputs)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), BLOCKED[format]))
    stored = pack_blocks(blocks, format)
    assert (stored.format, stored.out_features, stored.in_features) == (format, out, inputs)
    assert torch.equal(unpack(stored).view(torch.int32), expected.view(torch.int32))
    assert stored.num_bytes == -(-out // 16) * 16 * inputs // BLOCK * BLOCK_BYTES[format]


def test_int8_is_off_by_half_a_step_at_most() -> None:
    weight = numbers(50, 70) * torch.logspace(-6, 6, 50)[:, None]
    weight[7] = 0
    stored = pack(weight, WeightFormat.INT8)
    error = (unpack(stored) - weight).abs().amax(dim=1)
    step = weight.abs().amax(dim=1) / 127
    assert bool((error <= 0.5001 * step).all()) and bool((error[:7] > 0.4 * step[:7]).all())
    assert torch.equal(unpack(stored).abs().argmax(dim=1)[:7], weight.abs().argmax(dim=1)[:7])
    assert stored.num_bytes == 64 * 70


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="format is q8_0, expected one of float32, bfloat16, float16, int8"):
        pack(numbers(3, 32), WeightFormat.Q8_0)
    with pytest.raises(ValueError, match="rows of 40 bytes are no blocks of format q8_0"):
        pack_blocks(torch.zeros(3, 40, dtype=torch.uint8), WeightFormat.Q8_0)
    with pytest.raises(ValueError, match="rows of 40 bytes are no blocks of format float16"):
        pack_blocks(torch.zeros(3, 40, dtype=torch.uint8), WeightFormat.FLOAT16)


# Finding the smallest format that holds the same numbers


Exactly = Callable[[torch.Tensor], WeightFormat]


@pytest.fixture
def exactly(instruction_sets: list[str]) -> Exactly:
    """Pack a weight, see that it still holds the same numbers, and tell the format."""
    if not instruction_sets:
        pytest.skip("compiled kernels are not built: they look for blocks")

    def find(weight: torch.Tensor) -> WeightFormat:
        stored = pack_exactly(weight)
        # Equal but for the sign of zero.
        torch.testing.assert_close(unpack(stored), weight, rtol=0, atol=0, equal_nan=True)
        return stored.format

    return find


def quantised(format: WeightFormat, out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Random weights after a round trip through a GGUF file."""
    blocks = gguf.quants.quantize((0.02 * numbers(out, inputs, seed=seed)).numpy(), BLOCKED[format])
    return torch.from_numpy(gguf.quants.dequantize(blocks, BLOCKED[format]).astype(np.float32))


@pytest.mark.parametrize("format", BLOCKED)
@pytest.mark.parametrize(("out", "inputs"), [(1, 32), (50, 96), (300, 1024)])
@pytest.mark.parametrize("count", [1, 2])
def test_blocks_are_found_again(exactly: Exactly, format: WeightFormat, out: int, inputs: int, count: int) -> None:
    with threads(count):
        assert exactly(quantised(format, out, inputs)) is format


def test_16_bit_numbers_are_found_again(exactly: Exactly) -> None:
    assert exactly(numbers(50, 96).half().float()) is WeightFormat.FLOAT16
    # The range of float16 holds a random bfloat16 as well; not this one.
    assert exactly((1e6 * numbers(50, 96)).bfloat16().float()) is WeightFormat.BFLOAT16
    assert exactly(numbers(50, 96)) is WeightFormat.FLOAT32


def test_rows_that_are_no_whole_blocks_have_none(exactly: Exactly) -> None:
    assert exactly(quantised(WeightFormat.Q8_0, 3, 64)[:, :60].contiguous()) is WeightFormat.FLOAT32
    assert exactly(torch.zeros(3, 33)) is WeightFormat.FLOAT16


@pytest.mark.parametrize("format", BLOCKED)
@pytest.mark.parametrize("count", [1, 2])
def test_one_number_that_is_no_block_s_makes_all_float32(exactly: Exactly, format: WeightFormat, count: int) -> None:
    weight = quantised(format, 300, 1024)
    for row, column in ((0, 0), (0, 31), (150, 500), (299, 1023)):
        wrong = weight.clone()
        wrong[row, column] = torch.nextafter(wrong[row, column], torch.tensor(torch.inf))
        with threads(count):
            assert exactly(wrong) is WeightFormat.FLOAT32


@pytest.mark.parametrize(
    ("block", "format"),
    [
        (torch.zeros(32), WeightFormat.Q4_1),
        (torch.full((32,), 0.25), WeightFormat.Q4_1),
        (torch.full((32,), -3.0), WeightFormat.Q4_1),
        (torch.full((32,), 127.0), WeightFormat.Q4_1),
        (torch.arange(32.0) % 16, WeightFormat.Q4_1),
        (torch.arange(32.0) % 16 * 0.5 - 11, WeightFormat.Q4_1),
        # Steps that no block of 16 has.
        (torch.arange(32.0) * 4 + 3, WeightFormat.Q8_0),
        (-(torch.arange(32.0) * 4 + 3) / 1024, WeightFormat.Q8_0),
        (torch.full((32,), 127 * 2.0**-24), WeightFormat.Q4_1),
        (torch.cat([torch.tensor([127 * 2.0**-24]), torch.zeros(31)]), WeightFormat.Q8_0),
        # A zero with a sign, which the product with a scale loses and a sum with an offset does not bring back.
        (torch.cat([torch.tensor([-0.0, 127.0]), torch.zeros(30)]), WeightFormat.Q8_0),
        # -128 is no number of a block, 16 steps are one too many.
        (-(torch.arange(32.0) * 4 + 4), WeightFormat.FLOAT16),
        (torch.full((32,), 0.1), WeightFormat.FLOAT32),
        (torch.full((32,), 1e30), WeightFormat.FLOAT32),
        (torch.full((32,), 2.0**100), WeightFormat.BFLOAT16),
        (torch.full((32,), 1e-42), WeightFormat.FLOAT32),
        (torch.full((32,), torch.inf), WeightFormat.FLOAT16),
        (torch.cat([torch.tensor([torch.nan]), torch.zeros(31)]), WeightFormat.FLOAT32),
        (torch.cat([torch.zeros(31), torch.tensor([-torch.inf])]), WeightFormat.FLOAT16),
    ],
)
def test_odd_blocks(exactly: Exactly, block: torch.Tensor, format: WeightFormat) -> None:
    assert exactly(block[None]) is format
    beside = quantised(WeightFormat.Q8_0, 2, 64)
    beside[1, 32:] = block
    exactly(beside)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), format=st.sampled_from(list(BLOCKED)))
def test_any_block_keeps_its_numbers(exactly: Exactly, data: st.DataObject, format: WeightFormat) -> None:
    """Blocks that no program writes may be found or not: scales below zero, infinite or none, unused numbers."""
    size = BLOCK_BYTES[format]
    blocks = np.frombuffer(data.draw(st.binary(min_size=size, max_size=2 * size)), dtype=np.uint8)
    blocks = blocks[: len(blocks) // size * size].reshape(1, -1).copy()
    exactly(unpack(pack_blocks(torch.from_numpy(blocks), format)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scale=st.floats(2**-14, 2**-2, width=16),
    offset=st.floats(-1, 1, width=16),
    quants=st.lists(st.integers(0, 127), min_size=30, max_size=30),
    sign=st.sampled_from([-1, 1]),
)
def test_any_block_that_a_program_writes_is_found(
    exactly: Exactly, scale: float, offset: float, quants: list[int], sign: int
) -> None:
    signed = torch.tensor([127, -5, *(quant * sign for quant in quants)], dtype=torch.float32)
    assert exactly((signed * scale)[None]) in (WeightFormat.Q8_0, WeightFormat.Q4_1)
    nibbles = torch.tensor([0, 15, *(quant % 16 for quant in quants)], dtype=torch.float32)
    assert exactly((nibbles * scale + offset)[None]) is WeightFormat.Q4_1


@pytest.mark.parametrize(
    ("name", "weight", "format"),
    [
        ("weight", numbers(32), "q8_0"),
        ("weight", numbers(3, 32).half(), "q8_0"),
        ("weight", numbers(32, 32).T, "q8_0"),
        ("format is int8, expected q8_0 or q4_1", numbers(3, 32), "int8"),
    ],
)
def test_blocks_are_looked_for_in_float32_only(exactly: Exactly, name: str, weight: torch.Tensor, format: str) -> None:
    del exactly
    with pytest.raises(RuntimeError, match=name):
        torch.ops.slipstream.find_blocks(weight, format)
