"""Weights of linear layers, packed once for the CPU kernel that reads them for a handful of rows.

Outputs stand in panels of 16 columns; a panel holds, input by input, one number per column, so that a decode step
streams it in order. ``unpack`` is the definition: the kernel's result is the product with these very numbers.
"""

import mmap
from dataclasses import dataclass
from enum import StrEnum

import torch

PANEL = 16
BLOCK = 32
_HUGE_PAGE = 2 << 20


class WeightFormat(StrEnum):
    """How weights are held; all are widened to float32 in registers, where all arithmetic is done.

    ``FLOAT32`` is the reference. ``BFLOAT16`` and ``FLOAT16`` round it, unless it came from there. ``INT8`` has one
    scale per output. ``Q8_0`` and ``Q4_1`` are GGUF's blocks of 32 inputs, with a float16 scale each and, in ``Q4_1``,
    an offset: for weights that come from a GGUF file they are the same numbers as float32.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    Q8_0 = "q8_0"
    Q4_1 = "q4_1"


_DENSE = {
    WeightFormat.FLOAT32: torch.float32,
    WeightFormat.BFLOAT16: torch.bfloat16,
    WeightFormat.FLOAT16: torch.float16,
}
# Bytes of a block of 32 inputs of one output, as GGUF stores them.
_BLOCK_BYTES = {WeightFormat.Q8_0: 2 + BLOCK, WeightFormat.Q4_1: 4 + BLOCK // 2}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight ``[out, in]`` in the kernel's layout.

    Attributes:
        panels: uint8 bytes.
        scales: ``[out padded to panels]`` float32 for ``INT8``, else ``None``.
    """

    format: WeightFormat
    out_features: int
    in_features: int
    panels: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        return self.panels.numel()


def pack(weight: torch.Tensor, format: WeightFormat = WeightFormat.FLOAT32) -> PackedWeight:
    """Pack a float ``weight`` ``[out, in]`` on the CPU.

    Raises:
        ValueError: the format is one of blocks, which are packed by ``pack_blocks``.
    """
    out_features, in_features = weight.shape
    rows = _whole_panels(weight.detach().to(torch.float32))
    if format in _DENSE:
        return PackedWeight(format, out_features, in_features, _settle(_interleave(rows.to(_DENSE[format]))))
    if format is not WeightFormat.INT8:
        raise ValueError(f"format is {format}, expected one of {', '.join([*_DENSE, WeightFormat.INT8])}")
    scales = rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    quantised = (rows / scales[:, None]).round().to(torch.int8)
    return PackedWeight(format, out_features, in_features, _settle(_interleave(quantised)), scales)


def pack_blocks(blocks: torch.Tensor, format: WeightFormat) -> PackedWeight:
    """Pack GGUF blocks as they are stored.

    Args:
        blocks: ``[out, in / 32 * bytes of a block]`` uint8.
        format: ``Q8_0`` or ``Q4_1``.

    Raises:
        ValueError: the width is not a number of blocks of this format.
    """
    size = _BLOCK_BYTES.get(format, 0)
    if not size or blocks.shape[1] % size:
        raise ValueError(f"rows of {blocks.shape[1]} bytes are no blocks of format {format}")
    out_features, count = blocks.shape[0], blocks.shape[1] // size
    rows = _whole_panels(blocks).view(-1, PANEL, count, size).transpose(1, 2)  # [panels, blocks, 16, bytes]
    head = size - BLOCK if format is WeightFormat.Q8_0 else size - BLOCK // 2
    # Scales of all columns, then offsets of all columns; then, input by input, all columns.
    numbers = rows[..., :head].unflatten(-1, (-1, 2)).transpose(2, 3).flatten(2)
    quants = rows[..., head:]
    if format is WeightFormat.Q4_1:
        # GGUF pairs input i with input i + 16 in a byte; the kernel wants neighbours together.
        quants = torch.cat([quants & 15, quants >> 4], dim=-1)
        quants = quants[..., 0::2] | quants[..., 1::2] << 4
    packed = torch.cat([numbers, quants.transpose(2, 3).flatten(2)], dim=-1)
    return PackedWeight(format, out_features, count * BLOCK, _settle(packed))


def pack_exactly(weight: torch.Tensor) -> PackedWeight:
    """Pack a float32 ``weight`` ``[out, in]`` in the smallest format that holds every one of its numbers as it is.

    Weights that were widened from a GGUF file or from 16-bit numbers go back to what they were.
    """
    weight = weight.detach().contiguous()
    for format in (WeightFormat.Q4_1, WeightFormat.Q8_0):
        blocks = torch.ops.slipstream.find_blocks(weight, format.value)
        if blocks.numel():
            return pack_blocks(blocks, format)
    for format in (WeightFormat.FLOAT16, WeightFormat.BFLOAT16):
        if bool((weight.to(_DENSE[format]).float() == weight).all()):
            return pack(weight, format)
    return pack(weight)


def unpack(weight: PackedWeight) -> torch.Tensor:
    """The weight ``[out, in]`` in float32 that the packed one stands for."""
    count, panels = weight.in_features, weight.panels
    if weight.format in _DENSE:
        rows = panels.view(_DENSE[weight.format]).view(-1, count, PANEL).to(torch.float32)
    elif weight.format is WeightFormat.INT8:
        assert weight.scales is not None
        rows = panels.view(torch.int8).view(-1, count, PANEL).to(torch.float32)
        rows = rows * weight.scales.view(-1, 1, PANEL)
    else:
        rows = _unpack_blocks(weight)
    return rows.transpose(1, 2).reshape(-1, count)[: weight.out_features].contiguous()


def _unpack_blocks(weight: PackedWeight) -> torch.Tensor:
    """``[panels, in, 16]`` float32."""
    size, blocks = _BLOCK_BYTES[weight.format] * PANEL, weight.in_features // BLOCK
    packed = weight.panels.view(-1, blocks, size)
    if weight.format is WeightFormat.Q8_0:
        scale = packed[..., : 2 * PANEL].contiguous().view(torch.float16).float()[:, :, None]
        quants = packed[..., 2 * PANEL :].contiguous().view(torch.int8).view(-1, blocks, BLOCK, PANEL).float()
        return (quants * scale).flatten(1, 2)
    numbers = packed[..., : 4 * PANEL].contiguous().view(torch.float16).float()
    scale, offset = numbers[:, :, None, :PANEL], numbers[:, :, None, PANEL:]
    pairs = packed[..., 4 * PANEL :].view(-1, blocks, BLOCK // 2, PANEL)
    quants = torch.stack([pairs & 15, pairs >> 4], dim=3).flatten(2, 3).float()
    return (quants * scale + offset).flatten(1, 2)


def _whole_panels(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` with zero rows added up to a whole number of panels."""
    missing = -len(rows) % PANEL
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _interleave(rows: torch.Tensor) -> torch.Tensor:
    """``[out, in]`` to ``[panels, in, 16]``."""
    return rows.view(-1, PANEL, rows.shape[1]).transpose(1, 2)


def _settle(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of ``tensor`` in memory of their own, on huge pages where the system grants them.

    Weights are read from end to end at every step; with pages of 4 KiB a good part of that is address translation.
    """
    size = tensor.numel() * tensor.element_size()
    memory = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE + _HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    settled = whole[start : start + size]
    settled.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return settled
