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


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def source(format: WeightFormat, out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Something ``packed`` packs, row by row: floats, or blocks of at least as many inputs as were asked for."""
    if format not in BLOCKED:
        return numbers(out, inputs, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (out, -(-inputs // BLOCK))
    blocks = torch.randint(0, 256, (*shape, BLOCK_BYTES[format]), dtype=torch.uint8, generator=generator)
    head = torch.randn(*shape, HALVES[format], generator=generator).half()
    blocks[..., : 2 * HALVES[format]] = head.view(torch.uint8)
    return blocks.flatten(1)


def packed(format: WeightFormat, rows: torch.Tensor) -> PackedWeight:
    return pack_blocks(rows, format) if format in BLOCKED else pack(rows, format)


def make(format: WeightFormat, out: int, inputs: int, seed: int = 0) -> PackedWeight:
    return packed(format, source(format, out, inputs, seed))
