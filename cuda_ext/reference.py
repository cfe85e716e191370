"""The operations of the drafter's inner loop in plain PyTorch: the definition that every kernel is tested against."""

import torch
import torch.nn.functional as F


def block_attention(
    query: torch.Tensor,
    block_key: torch.Tensor,
    block_value: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of a block of draft slots over a paged context and over the block itself.

    Slots stand in physical order; their rotary positions were applied before and need not follow it. Every slot
    sees the whole context and the first ``visible`` slots of its block.

    Args:
        query: ``[requests, block, heads, head_dim]``.
        block_key, block_value: ``[requests, block, kv_heads, head_dim]``.
        pages: ``[num_pages, 2, page_size, kv_heads, head_dim]``, keys at index 0 of the second axis, values at 1.
        block_table: ``[requests, max_pages]`` integer page ids.
        context_lens: ``[requests]`` integer tokens of context, zero allowed.
        visible: ``[requests, block]`` integer physical slots each query sees, at least 1.
        scale: factor on the dot products.

    Returns:
        ``[requests, block, heads, head_dim]`` in the query's dtype.
    """
    requests, block, heads, head_dim = query.shape
    page_size, kv_heads = pages.shape[2], pages.shape[3]
    longest = int(context_lens.max()) if requests else 0
    num_pages = -(-longest // page_size)
    context = pages[block_table[:, :num_pages].long()]
    context = context.transpose(1, 2).reshape(requests, 2, num_pages * page_size, kv_heads, head_dim)
    key = torch.cat([context[:, 0], block_key], dim=1).transpose(1, 2)
    value = torch.cat([context[:, 1], block_value], dim=1).transpose(1, 2)
    in_context = torch.arange(num_pages * page_size, device=query.device) < context_lens[:, None]
    in_block = torch.arange(block, device=query.device) < visible[..., None]
    mask = torch.cat([in_context[:, None].expand(-1, block, -1), in_block], dim=2)[:, None]
    # Rows of pages that belong to nobody may hold anything, NaN included, which a zero weight would not hide.
    key = key.masked_fill(~mask.any(dim=2)[..., None], 0)
    value = value.masked_fill(~mask.any(dim=2)[..., None], 0)
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2), key, value, attn_mask=mask, scale=scale, enable_gqa=heads != kv_heads
    )
    return output.transpose(1, 2)


def write_pages(pages: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Store context keys and values in their pages.

    Args:
        pages: ``[num_pages, 2, page_size, kv_heads, head_dim]``, changed in place.
        key, value: ``[tokens, kv_heads, head_dim]``.
        slot_mapping: ``[tokens]`` int64, page * page_size + offset; negative entries are skipped.
    """
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    page_size = pages.shape[2]
    page, offset = slot_mapping // page_size, slot_mapping % page_size
    pages[page, 0, offset] = key
    pages[page, 1, offset] = value
