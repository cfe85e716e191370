"""What the operators of whole layers should compute, written once more: dense, in double precision, head by head."""

import numpy as np
import numpy.typing as npt
import torch

from cuda_ext.decoder import DecoderLayerWeights
from cuda_ext.linear import PackedWeight, unpack
from tests.cuda_ext.layers import Case, Outcome, angles
from tests.cuda_ext.oracle import rms_norm, rotate

Floats = npt.NDArray[np.float64]


def expected(case: Case, weights: DecoderLayerWeights | None = None) -> Outcome:
    """What ``case`` should give, float64; caches hold unrounded numbers where something was written.

    ``weights`` are other ones than those of the case's shape.
    """
    weights = weights or case.shape.weights
    layer = _decoder_layer if case.operator == "decoder_layer" else _draft_layer
    return layer(case, weights)


def _decoder_layer(case: Case, weights: DecoderLayerWeights) -> Outcome:
    stream, query, key, value = _project(case, weights)
    keys, values = (_floats(case[name]) for name in case.written)
    rounded_keys, rounded_values = keys.copy(), values.copy()
    page_size = keys.shape[1]
    for token, slot in enumerate(case["slot_mapping"].tolist()):
        if slot >= 0:
            at = divmod(slot, page_size)
            keys[at], values[at] = key[token], value[token]
            rounded_keys[at], rounded_values[at] = (_rounded(case, rows[token]) for rows in (key, value))
    attended, starts = np.zeros(query.shape), case["query_starts"].tolist()
    for r, length in enumerate(case["context_lens"].tolist()):
        seen_keys, seen_values = (_context(pages, case, r, length) for pages in (rounded_keys, rounded_values))
        for token in range(starts[r], starts[r + 1]):
            seen = length - (starts[r + 1] - 1 - token)
            attended[token] = _attend(case, query[token], seen_keys[:seen], seen_values[:seen])
    return _finished(case, weights, stream, attended, keys, values)


def _draft_layer(case: Case, weights: DecoderLayerWeights) -> Outcome:
    stream, query, key, value = _project(case, weights)
    keys, values = (_floats(case[name]) for name in case.written)
    rounded_keys, rounded_values = keys.copy(), values.copy()
    requests, queries = case["places"].shape
    for row, place in enumerate(case["places"].flatten().tolist()):
        if place >= 0:
            at = (row // queries, place)
            keys[at], values[at] = key[row], value[row]
            rounded_keys[at], rounded_values[at] = (_rounded(case, rows[row]) for rows in (key, value))
    attended = np.zeros(query.shape)
    for r in range(requests):
        length = int(case["context_lens"][r])
        contexts = [_context(_floats(case[name]), case, r, length) for name in ("key_cache", "value_cache")]
        for q in range(queries):
            seen = int(case["visible"][r, q])
            seen_keys = np.concatenate([contexts[0], rounded_keys[r, :seen]])
            seen_values = np.concatenate([contexts[1], rounded_values[r, :seen]])
            attended[r * queries + q] = _attend(case, query[r * queries + q], seen_keys, seen_values)
    return _finished(case, weights, stream, attended, keys, values)


def _project(case: Case, weights: DecoderLayerWeights) -> tuple[Floats, Floats, Floats, Floats]:
    """The residual stream ``[rows, hidden]``, and queries, keys and values ``[rows, heads, head_dim]``, rotated."""
    shape = case.shape
    stream = _floats(case["hidden"].flatten(0, -2))
    if case["residual"] is not None:
        stream = stream + _floats(case["residual"]).reshape(stream.shape)
    normed = np.array([rms_norm(row, weights.input_norm, weights.eps) for row in stream]).reshape(stream.shape)
    qkv = normed @ _dense(weights.qkv).T
    if weights.qkv_bias is not None:
        qkv = qkv + _floats(weights.qkv_bias)
    heads = qkv.reshape(len(stream), shape.heads + 2 * shape.kv_heads, shape.head_dim)
    turned = heads.copy()
    for row, position in enumerate(case["positions"].flatten().tolist()):
        for head in range(shape.heads + shape.kv_heads):
            norm = weights.query_norm if head < shape.heads else weights.key_norm
            normed_head = rms_norm(heads[row, head], norm, weights.eps)
            turned[row, head] = rotate(normed_head, angles(shape.head_dim)[position])
    query, key, value = np.split(turned, [shape.heads, shape.heads + shape.kv_heads], axis=1)
    return stream, query, key, value


def _context(pages: Floats, case: Case, request: int, length: int) -> Floats:
    """Rows ``[length, kv_heads, head_dim]`` of one request, fetched one by one."""
    page_size, table = pages.shape[1], case["block_tables"][request].tolist()
    rows = [pages[table[token // page_size], token % page_size] for token in range(length)]
    return np.array(rows).reshape(length, *pages.shape[2:])


def _attend(case: Case, query: Floats, keys: Floats, values: Floats) -> Floats:
    """One row ``[heads, head_dim]`` over what it sees; nothing seen is zero by definition."""
    if not len(keys):
        return np.zeros(query.shape)
    group = len(query) // keys.shape[1]
    result = np.empty(query.shape)
    for head, row in enumerate(query):
        scores = case["scale"] * (keys[:, head // group] @ row)
        weights = np.exp(scores - scores.max())
        result[head] = weights @ values[:, head // group] / weights.sum()
    return result


def _finished(
    case: Case, weights: DecoderLayerWeights, stream: Floats, attended: Floats, keys: Floats, values: Floats
) -> Outcome:
    """The rest of the layer behind attention."""
    stream = stream + attended.reshape(len(stream), attended.shape[1] * attended.shape[2]) @ _dense(weights.output).T
    normed = np.array([rms_norm(row, weights.post_norm, weights.eps) for row in stream]).reshape(stream.shape)
    gate, up = np.split(normed @ _dense(weights.gate_up).T, 2, axis=1)
    output = (gate / (1 + np.exp(-gate)) * up) @ _dense(weights.down).T
    back = case["hidden"].shape
    return Outcome(*(torch.from_numpy(part) for part in (output.reshape(back), stream.reshape(back), keys, values)))


def _dense(weight: PackedWeight) -> Floats:
    return _floats(unpack(weight))


def _rounded(case: Case, row: Floats) -> Floats:
    """As the caches hold it."""
    return _floats(torch.from_numpy(row).to(case[case.written[0]].dtype))


def _floats(tensor: torch.Tensor) -> Floats:
    floats: Floats = tensor.double().numpy().copy()
    return floats
