"""Weights for the tests of linear layers, in all formats."""

import gguf
import torch

from cuda_ext.linear import BLOCK, PackedWeight, WeightFormat, pack, pack_blocks

FORMATS = tuple(WeightFormat)
DENSE = {
    WeightFormat.FLOAT32: torch.float32,
    WeightFormat.BFLOAT16: torch.bfloat16,
    WeightFormat.FLOAT16: torch.float16,
}
BLOCKED = {
    WeightFormat.Q8_0: gguf.GGMLQuantizationType.Q8_0,
    WeightFormat.Q4_1: gguf.GGMLQuantizationType.Q4_1,
}
BLOCK_BYTES = {WeightFormat.Q8_0: 34, WeightFormat.Q4_1: 20}
HALVES = {WeightFormat.Q8_0: 1, WeightFormat.Q4_1: 2}
"""16-bit numbers in front of a block."""
SPREAD = {WeightFormat.Q8_0: 74.0, WeightFormat.Q4_1: 8.9}
"""Of the numbers in random blocks whose scales and offsets are spread as the standard normal distribution is."""


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def source(format: WeightFormat, out: int, inputs: int, seed: int = 0, factor: float = 1.0) -> torch.Tensor:
    """Something ``packed`` packs, row by row: floats, or blocks of at least as many inputs as were asked for.

    ``factor`` is one on the numbers, or in blocks on scales and offsets.
    """
    if format not in BLOCKED:
        return factor * numbers(out, inputs, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (out, -(-inputs // BLOCK))
    blocks = torch.randint(0, 256, (*shape, BLOCK_BYTES[format]), dtype=torch.uint8, generator=generator)
    head = (factor * torch.randn(*shape, HALVES[format], generator=generator)).half()
    blocks[..., : 2 * HALVES[format]] = head.view(torch.uint8)
    return blocks.flatten(1)


def packed(format: WeightFormat, rows: torch.Tensor) -> PackedWeight:
    return pack_blocks(rows, format) if format in BLOCKED else pack(rows, format)


def make(format: WeightFormat, out: int, inputs: int, seed: int = 0) -> PackedWeight:
    return packed(format, source(format, out, inputs, seed))


def make_even(format: WeightFormat, out: int, inputs: int, seed: int = 0) -> PackedWeight:
    """A weight whose products with inputs of about one are of about one."""
    factor = inputs**-0.5 / SPREAD.get(format, 1.0)
    return packed(format, source(format, out, inputs, seed, factor))
