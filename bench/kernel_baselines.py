"""What the attention operator is measured against: PyTorch's own attention over pages that were gathered before."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.kernel_report import KernelShape

__all__ = ["Batch", "BufferedAttention", "PlainAttention", "grouped_attention", "make_batch"]


@dataclass(frozen=True, slots=True)
class Batch:
    """What a run gets besides the pages: arguments of the operator, and ``mask`` ``[slots, context + slots]`` bool,
    which says the same as ``context_lens`` and ``visible``.
    """

    query: torch.Tensor
    block_key: torch.Tensor
    block_value: torch.Tensor
    context_lens: torch.Tensor
    visible: torch.Tensor
    mask: torch.Tensor
    scale: float


def make_batch(shape: KernelShape, context: int, requests: int) -> Batch:
    """Random queries, keys and values of causal blocks behind contexts of equal length."""
    generator = torch.Generator().manual_seed(0)
    width = shape.heads + 2 * shape.kv_heads
    qkv = torch.randn(requests, shape.slots, width, shape.head_dim, generator=generator)
    query, key, value = qkv.to(getattr(torch, shape.dtype)).split([shape.heads, shape.kv_heads, shape.kv_heads], dim=2)
    in_block = torch.ones(shape.slots, shape.slots, dtype=torch.bool).tril()
    return Batch(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        context_lens=torch.full((requests,), context, dtype=torch.int32),
        visible=torch.arange(1, shape.slots + 1, dtype=torch.int32).repeat(requests, 1),
        mask=torch.cat([torch.ones(shape.slots, context, dtype=torch.bool), in_block], dim=1),
        scale=float(shape.head_dim**-0.5),
    )


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """SDPA in which the heads that share keys are queries of one head, so that no key is repeated.

    Args:
        query: ``[requests, slots, heads, head_dim]``.
        key, value: ``[requests, kv_heads, length, head_dim]``.
        mask: ``[group * slots, length]`` bool, the same for every head of a group.
        scale: factor on the dot products.

    Returns:
        ``[requests, slots, heads, head_dim]``.
    """
    slots, kv_heads = query.shape[1], key.shape[1]
    # [requests, kv_heads, group * slots, head_dim]
    folded = query.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return torch.reshape(output.unflatten(2, (-1, slots)).permute(0, 3, 1, 2, 4), query.shape)


class PlainAttention:
    """As one would write it: index the caches with the block table, append the block, attend."""

    def __init__(self, batch: Batch):
        self._batch = batch

    def __call__(self, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """From caches ``[pages, page_size, kv_heads, head_dim]`` to ``[requests, slots, heads, head_dim]``."""
        batch = self._batch
        context = batch.mask.shape[1] - batch.mask.shape[0]
        key, value = (
            torch.cat([pages[table].flatten(1, 2)[:, :context], block], dim=1).transpose(1, 2)
            for pages, block in ((keys, batch.block_key), (values, batch.block_value))
        )
        query = batch.query.transpose(1, 2)
        grouped = query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=batch.mask, scale=batch.scale, enable_gqa=grouped
        )
        return output.transpose(1, 2)


class BufferedAttention:
    """As fast as it gets without a kernel: pages are copied once, into buffers that are kept from call to call, and
    no key is repeated.
    """

    def __init__(self, batch: Batch, shape: KernelShape):
        self._batch = batch
        requests, context = len(batch.query), batch.mask.shape[1] - shape.slots
        self._width = shape.pages(context)
        pages = self._width + shape.pages(shape.slots)
        size = (requests, pages, shape.page_size, shape.kv_heads, shape.head_dim)
        self._buffers = [torch.zeros(size, dtype=batch.query.dtype) for _ in range(2)]
        self._mask = batch.mask.repeat(shape.heads // shape.kv_heads, 1)

    def __call__(self, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """See ``PlainAttention``."""
        batch = self._batch
        key, value = (
            self._gathered(buffer, pages, block, table)
            for buffer, pages, block in zip(
                self._buffers, (keys, values), (batch.block_key, batch.block_value), strict=True
            )
        )
        return grouped_attention(batch.query, key, value, self._mask, batch.scale)

    def _gathered(
        self, buffer: torch.Tensor, pages: torch.Tensor, block: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """Context and block ``[requests, kv_heads, context + slots, head_dim]``, a view of the buffer."""
        for row, ids in zip(buffer, table, strict=True):
            torch.index_select(pages, 0, ids, out=row[: self._width])
        rows, length = buffer.flatten(1, 2), self._batch.mask.shape[1]
        rows[:, length - block.shape[1] : length] = block
        return rows[:, :length].transpose(1, 2)
