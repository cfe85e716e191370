"""The operations of the drafter's inner loop in plain PyTorch: the definitions that every kernel is tested against.

They run on any device and are what a machine without compiled kernels uses. A *block* holds a request's draft slots.
Its slots have a logical place, which gives their rotary position, and a physical one, which says what they see:
observed slots stand first, slots still masked behind them, and attention is causal in physical order (WeDLM's
topological reordering, arXiv 2512.22737).
"""

import itertools
from functools import partial

import torch
import torch.nn.functional as F

from cuda_ext.linear import PackedWeight, WeightFormat, unpack


def block_attention(
    query: torch.Tensor,
    block_key: torch.Tensor,
    block_value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of draft slots over a paged context and over their own block.

    Every query sees the whole context and the first ``visible`` physical slots of its block. One operation so serves
    reordered causal blocks, one-pass blocks, DFlash's bidirectional ones, and refinement passes, which bring fewer
    queries than the block has slots.

    Args:
        query: ``[requests, queries, heads, head_dim]``, rotated.
        block_key, block_value: ``[requests, slots, kv_heads, head_dim]`` in physical order, keys rotated.
        key_cache, value_cache: ``[pages, page_size, kv_heads, head_dim]``.
        block_tables: ``[requests, max_pages]`` int32 page ids; entries past a request's context may hold anything.
        context_lens: ``[requests]`` int32 tokens of context, zero allowed.
        visible: ``[requests, queries]`` int32 slots that each query sees, 0 to ``slots``. A query that sees neither
            context nor slots gets zeros.
        scale: factor on the dot products.

    Returns:
        ``[requests, queries, heads, head_dim]`` in the query's dtype.
    """
    requests, queries, heads, head_dim = query.shape
    slots = block_key.shape[1]
    page_size, kv_heads = key_cache.shape[1], key_cache.shape[2]
    longest = int(context_lens.max()) if requests else 0
    num_pages = -(-longest // page_size)
    pages = block_tables[:, :num_pages].long()
    reach = torch.arange(num_pages * page_size, device=query.device)
    # Entries past a request's context may be no page at all.
    pages = pages.where(reach[::page_size] < context_lens[:, None], 0)
    shape = (requests, num_pages * page_size, kv_heads, head_dim)
    key = torch.cat([key_cache[pages].reshape(shape), block_key], dim=1).transpose(1, 2)
    value = torch.cat([value_cache[pages].reshape(shape), block_value], dim=1).transpose(1, 2)
    in_context = reach < context_lens[:, None]
    in_block = torch.arange(slots, device=query.device) < visible[..., None]
    mask = torch.cat([in_context[:, None].expand(-1, queries, -1), in_block], dim=2)[:, None]
    # Rows that nobody sees may hold anything, NaN included, which a zero weight would not hide.
    seen = mask.any(dim=2)[..., None]
    key, value = key.masked_fill(~seen, 0), value.masked_fill(~seen, 0)
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2), key, value, attn_mask=mask, scale=scale, enable_gqa=heads != kv_heads
    )
    return output.masked_fill(~mask.any(dim=3)[..., None], 0).transpose(1, 2).contiguous()


def partition_block(
    observed_at: torch.Tensor, first_positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Physical order of blocks: a stable partition by the pass in which a slot was observed.

    Slots observed earlier stand before slots observed later, masked ones (the largest number) last, and equals keep
    their logical order. So what an earlier pass has cached stays where it is and newly observed slots follow it.

    Args:
        observed_at: ``[requests, slots]`` int32, by logical slot.
        first_positions: ``[requests]`` int64, position of logical slot 0.

    Returns:
        ``order`` ``[requests, slots]`` int64, the logical slot at each physical place; its ``inverse``, the place of
        each logical slot; ``positions`` int64, the rotary position at each place; ``visible`` int32, the slots that
        each place sees under causal attention.
    """
    requests, slots = observed_at.shape
    order = observed_at.argsort(dim=1, stable=True)
    inverse = torch.empty_like(order).scatter_(1, order, torch.arange(slots, device=order.device).expand_as(order))
    visible = torch.arange(1, slots + 1, dtype=torch.int32, device=order.device).expand(requests, slots).contiguous()
    return order, inverse, first_positions[:, None] + order, visible


def write_context(
    key: torch.Tensor,
    value: torch.Tensor,
    key_norm: torch.Tensor | None,
    eps: float,
    rotary_table: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> None:
    """Norm and rotate context keys and store them and their values in their pages.

    Args:
        key, value: ``[tokens, kv_heads, head_dim]``.
        key_norm: ``[head_dim]`` weight of the RMS norm of keys, or ``None``.
        eps: of that norm.
        rotary_table: ``[positions, 2, head_dim]``, see ``rotate``.
        positions: ``[tokens]`` int64.
        slot_mapping: ``[tokens]`` int64, page * page_size + offset; rows with a negative entry are skipped.
        key_cache, value_cache: ``[pages, page_size, kv_heads, head_dim]``, changed in place.
    """
    kept = slot_mapping >= 0
    if not bool(kept.all()):
        key, value, positions, slot_mapping = key[kept], value[kept], positions[kept], slot_mapping[kept]
    page_size = key_cache.shape[1]
    page, offset = slot_mapping // page_size, slot_mapping % page_size
    key_cache[page, offset] = rotate(rms_norm(key, key_norm, eps), rotary_table, positions).to(key_cache.dtype)
    value_cache[page, offset] = value.to(value_cache.dtype)


def append_block(
    qkv: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
    rotary_table: torch.Tensor,
    positions: torch.Tensor,
    places: torch.Tensor,
    block_key: torch.Tensor,
    block_value: torch.Tensor,
) -> torch.Tensor:
    """Norm and rotate the queries and keys of new slots, and put keys and values at their physical places.

    Args:
        qkv: ``[requests, queries, (heads + 2 * kv_heads) * head_dim]``: queries, keys and values of each row.
        query_norm, key_norm: ``[head_dim]`` weights of RMS norms, or ``None``.
        eps: of the norms.
        rotary_table: ``[positions, 2, head_dim]``, see ``rotate``.
        positions: ``[requests, queries]`` int64 logical positions.
        places: ``[requests, queries]`` int64 physical places; a row with a negative one is not stored.
        block_key, block_value: ``[requests, slots, kv_heads, head_dim]``, changed in place.

    Returns:
        The queries ``[requests, queries, heads, head_dim]``.
    """
    kv_heads, head_dim = block_key.shape[2:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    query, key, value = heads.split([heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    key = rotate(rms_norm(key, key_norm, eps), rotary_table, positions)
    row, column = (places >= 0).nonzero(as_tuple=True)
    block_key[row, places[row, column]] = key[row, column].to(block_key.dtype)
    block_value[row, places[row, column]] = value[row, column].to(block_value.dtype)
    return rotate(rms_norm(query, query_norm, eps), rotary_table, positions)


def linear(
    input: torch.Tensor, panels: torch.Tensor, scales: torch.Tensor | None, out: int, format: str
) -> torch.Tensor:
    """Product with a packed weight, see ``cuda_ext.linear``.

    Args:
        input: ``[rows, in]`` float32.
        panels: the packed weight's bytes.
        scales: of ``int8`` weights, else ``None``.
        out: outputs.
        format: a ``WeightFormat``.

    Returns:
        ``[rows, out]`` float32.
    """
    return F.linear(input, unpack(PackedWeight(WeightFormat(format), out, input.shape[1], panels, scales)))


def likely_tokens(
    logits: torch.Tensor, bias: torch.Tensor | None, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The likeliest tokens of rows of logits, without writing down the probabilities of all.

    Args:
        logits: ``[blocks, vocab]`` float32.
        bias: ``[blocks, rows, vocab]`` float32 that makes several rows of each block's logits, or ``None`` for one.
        count: tokens wanted, at most ``vocab``.

    Returns:
        ``[blocks, rows, count]`` float32 falling probabilities; int64, whose they are, of equal ones those with
        smaller ids first; ``[blocks, rows]`` float32 logarithms of the sums of exponentials.
    """
    rows = logits[:, None] if bias is None else logits[:, None] + bias
    tokens = rows.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()
    return rows.softmax(dim=-1).gather(-1, tokens), tokens, rows.logsumexp(dim=-1)


def decoder_layer(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    rotary_table: torch.Tensor,
    scale: float,
    input_norm: torch.Tensor,
    post_norm: torch.Tensor,
    eps: float,
    panels: list[torch.Tensor],
    scales: list[torch.Tensor],
    formats: list[str],
    heads: int,
    intermediate: int,
    qkv_bias: torch.Tensor | None,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder layer of the target for the new tokens of several requests, causal over their paged context.

    Keys and values of the new tokens are stored first; then the last ``query_starts[r + 1] - query_starts[r]`` of the
    ``context_lens[r]`` tokens of request ``r`` are the queries. For the arguments from ``input_norm`` on see
    ``cuda_ext.decoder.DecoderLayerWeights``.

    Args:
        hidden: ``[tokens, hidden]`` float32, what the layer before added to ``residual``.
        residual: ``[tokens, hidden]`` float32, or ``None`` before the first layer.
        positions: ``[tokens]`` int64.
        key_cache, value_cache: ``[pages, page_size, kv_heads, head_dim]``, changed in place.
        slot_mapping: ``[tokens]`` int64, page * page_size + offset; tokens with a negative one are not stored.
        block_tables: ``[requests, max_pages]`` int32 page ids.
        context_lens: ``[requests]`` int32 tokens, the new ones included.
        query_starts: ``[requests + 1]`` int32 rising from 0; rows from the last on are padding and see nothing.
        rotary_table: ``[positions, 2, head_dim]``, see ``rotate``.
        scale: factor on the dot products.

    Returns:
        What the layer adds to the residual stream last, and the residual stream before that.
    """
    project = partial(_project, panels, scales, formats)
    stream = hidden if residual is None else hidden + residual
    kv_heads, head_dim = key_cache.shape[2:]
    qkv = project(rms_norm(stream, input_norm, eps), 0, (heads + 2 * kv_heads) * head_dim)
    if qkv_bias is not None:
        qkv = qkv + qkv_bias
    query, key, value = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    write_context(key, value, key_norm, eps, rotary_table, positions, slot_mapping, key_cache, value_cache)
    query = rotate(rms_norm(query, query_norm, eps), rotary_table, positions)
    attended = torch.zeros_like(query)
    nothing = query.new_empty(1, 0, kv_heads, head_dim)
    for row, (first, last) in enumerate(itertools.pairwise(query_starts.tolist())):
        for token in range(first, last):
            seen = context_lens[row : row + 1] - (last - 1 - token)
            attended[token] = block_attention(
                query[None, None, token].to(key_cache.dtype),
                nothing.to(key_cache.dtype),
                nothing.to(key_cache.dtype),
                key_cache,
                value_cache,
                block_tables[row : row + 1],
                seen,
                seen.new_zeros(1, 1),
                scale,
            )[0, 0]
    stream = stream + project(attended.flatten(1), 1, hidden.shape[1])
    gate, up = project(rms_norm(stream, post_norm, eps), 2, 2 * intermediate).chunk(2, dim=-1)
    return project(F.silu(gate) * up, 3, hidden.shape[1]), stream


def draft_layer(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    positions: torch.Tensor,
    places: torch.Tensor,
    visible: torch.Tensor,
    block_key: torch.Tensor,
    block_value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    rotary_table: torch.Tensor,
    scale: float,
    input_norm: torch.Tensor,
    post_norm: torch.Tensor,
    eps: float,
    panels: list[torch.Tensor],
    scales: list[torch.Tensor],
    formats: list[str],
    heads: int,
    intermediate: int,
    qkv_bias: torch.Tensor | None,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder layer of the drafter for some slots of the blocks of several requests.

    Keys and values of the slots are put at their physical places first; then every slot sees the whole paged context
    of its request, which is left as it is, and the first ``visible`` places of its block. For the arguments from
    ``input_norm`` on see ``cuda_ext.decoder.DecoderLayerWeights``, for the others ``append_block`` and
    ``block_attention``.

    Args:
        hidden: ``[requests, queries, hidden]`` float32, what the layer before added to ``residual``.
        residual: of the same shape, or ``None`` before the first layer.

    Returns:
        What the layer adds to the residual stream last, and the residual stream before that.
    """
    project = partial(_project, panels, scales, formats)
    stream = hidden if residual is None else hidden + residual
    kv_heads, head_dim = block_key.shape[2:]
    qkv = project(rms_norm(stream, input_norm, eps), 0, (heads + 2 * kv_heads) * head_dim)
    if qkv_bias is not None:
        qkv = qkv + qkv_bias
    query = append_block(qkv, query_norm, key_norm, eps, rotary_table, positions, places, block_key, block_value)
    attended = block_attention(
        query.to(key_cache.dtype),
        *(block_key, block_value, key_cache, value_cache, block_tables, context_lens, visible, scale),
    )
    stream = stream + project(attended.to(hidden.dtype).flatten(2), 1, hidden.shape[-1])
    gate, up = project(rms_norm(stream, post_norm, eps), 2, 2 * intermediate).chunk(2, dim=-1)
    return project(F.silu(gate) * up, 3, hidden.shape[-1]), stream


def _project(
    panels: list[torch.Tensor], scales: list[torch.Tensor], formats: list[str], x: torch.Tensor, index: int, out: int
) -> torch.Tensor:
    held = scales[index] if scales[index].numel() else None
    return linear(x.flatten(0, -2), panels[index], held, out, formats[index]).view(*x.shape[:-1], out)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last axis; without a weight, ``x`` itself."""
    return x if weight is None else F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def rotate(x: torch.Tensor, rotary_table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in half-split (NeoX) layout.

    Args:
        x: ``[*rows, heads, head_dim]``.
        rotary_table: ``[positions, 2, head_dim]`` float32: at index 0 the cosines, twice over; at index 1 the sines,
            negated in the first half.
        positions: ``[*rows]`` int64.
    """
    rows = rotary_table[positions]
    return turn(x, rows[..., :1, :], rows[..., 1:, :]).to(x.dtype)


def turn(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """``rotate`` by rows of the table that are there already, in the wider of the types; differentiable.

    Args:
        x: ``[..., head_dim]``.
        cosines, sines: broadcast to it.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cosines, torch.cat([second, first], dim=-1), sines)
