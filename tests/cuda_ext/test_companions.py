"""Block order, context writes and, in PyTorch alone, block writes, against loops."""

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_ext import ops
from cuda_ext.reference import append_block
from tests.cuda_ext.oracle import rms_norm, rotary_table, rotate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
POSITIONS = 50

Observed = list[list[int]]


def tolerance(dtype: torch.dtype) -> float:
    """In 16 bits the norm's weights, its result and the rotated row are rounded; float32 adds up the squares."""
    return (16 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def angles(head_dim: int) -> torch.Tensor:
    frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return torch.arange(POSITIONS).double()[:, None] * frequencies


def rotated(row: torch.Tensor, norm: torch.Tensor | None, position: int) -> torch.Tensor:
    turned = rotate(rms_norm(row.double().numpy(), norm, EPS), angles(row.shape[-1])[position])
    return torch.from_numpy(turned)


# Order of a block


def sorted_block(observed_at: list[int], first: int) -> tuple[list[int], list[int], list[int], list[int]]:
    order = sorted(range(len(observed_at)), key=lambda slot: observed_at[slot])
    inverse = [order.index(slot) for slot in range(len(order))]
    return order, inverse, [first + slot for slot in order], list(range(1, len(order) + 1))


def check_order(operations: ModuleType, observed_at: Observed, first: list[int]) -> None:
    result = operations.partition_block(
        torch.tensor(observed_at, dtype=torch.int32), torch.tensor(first, dtype=torch.int64)
    )
    assert [part.dtype for part in result] == [torch.int64, torch.int64, torch.int64, torch.int32]
    expected = [sorted_block(*row) for row in zip(observed_at, first, strict=True)]
    assert list(zip(*(part.tolist() for part in result), strict=True)) == expected


@pytest.mark.parametrize(
    "observed_at",
    [
        [[0, 1, 1, 1]],
        [[0, 2, 1, 2, 1], [0, 1, 1, 1, 1], [5, 4, 3, 2, 1]],
        [[2**31 - 1, -(2**31), 0]],
        [[3], [1]],
        [[]],
    ],
    ids=["whole block", "ragged", "extremes", "one slot", "no slots"],
)
def test_observed_slots_stand_first(operations: ModuleType, observed_at: Observed) -> None:
    check_order(operations, observed_at, list(range(7, 7 + len(observed_at))))


def test_order_of_no_requests(operations: ModuleType) -> None:
    result = operations.partition_block(torch.empty(0, 4, dtype=torch.int32), torch.empty(0, dtype=torch.int64))
    assert [part.shape for part in result] == [(0, 4)] * 4


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1)))
def test_order_of_any_block(operations: ModuleType, observed_at: Observed) -> None:
    check_order(operations, observed_at, [10**12 + 3 * row for row in range(len(observed_at))])


# Context keys and values in their pages


def check_context(
    operations: ModuleType,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    head_dim: int = 8,
    slot_mapping: tuple[int, ...] = (3, 4, 5, -1, 17, 0, -9, 2),
    norm: torch.Tensor | None = None,
) -> None:
    """Write into pages of three tokens, and look at every row of them."""
    tokens, cache_dtype = len(slot_mapping), cache_dtype or dtype
    # Keys and values are views of one projection, the caches of one tensor, as serving has them.
    key, value = numbers(tokens, 2, 2, head_dim, dtype=dtype).unbind(1)
    pages = numbers(6, 2, 3, 2, head_dim, dtype=cache_dtype)
    before = pages.clone()
    positions = torch.arange(tokens) * 5 % POSITIONS
    operations.write_context(
        key,
        value,
        norm,
        EPS,
        rotary_table(angles(head_dim)),
        positions,
        torch.tensor(slot_mapping, dtype=torch.int64),
        pages[:, 0],
        pages[:, 1],
    )
    expected = before.double()
    for token, slot in enumerate(slot_mapping):
        for head in range(2 if slot >= 0 else 0):
            page, offset = divmod(slot, 3)
            before[page, 0, offset, head] = pages[page, 0, offset, head]
            before[page, 1, offset, head] = value[token, head].to(cache_dtype)
            expected[page, 0, offset, head] = rotated(key[token, head], norm, int(positions[token]))
    assert torch.equal(pages, before), "another row has changed, or a value is not what was given"
    bound = max(tolerance(dtype), tolerance(cache_dtype))
    torch.testing.assert_close(pages[:, 0].double(), expected[:, 0], rtol=bound, atol=bound)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 8, 64, 80, 256])
def test_context_keys_are_normed_and_rotated(
    operations: ModuleType, head_dim: int, dtype: torch.dtype, normed: bool
) -> None:
    check_context(operations, dtype, head_dim=head_dim, norm=1 + numbers(head_dim) / 4 if normed else None)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_context_is_converted_to_the_caches_format(operations: ModuleType, cache_dtype: torch.dtype) -> None:
    check_context(operations, torch.float32, cache_dtype)


@pytest.mark.parametrize(
    "slot_mapping", [(), (-1, -1), (0,), tuple(range(17, -1, -1))], ids=["nothing", "only padding", "one", "all"]
)
def test_rows_of_any_slots(operations: ModuleType, slot_mapping: tuple[int, ...]) -> None:
    check_context(operations, slot_mapping=slot_mapping)


def test_a_norm_of_zeros_is_held_up_by_eps(operations: ModuleType) -> None:
    pages = torch.full((1, 2, 1, 1, 4), torch.nan)
    zeros, index = torch.zeros(1, 1, 4), torch.zeros(1, dtype=torch.int64)
    table = rotary_table(angles(4))
    operations.write_context(zeros, zeros, torch.ones(4), EPS, table, index, index, pages[:, 0], pages[:, 1])
    assert pages.count_nonzero() == 0


# Slots of a block; the kernels that do this for a whole layer are tested in test_decoder_layer


def check_block(
    dtype: torch.dtype = torch.float32,
    head_dim: int = 8,
    heads: int = 4,
    places: tuple[tuple[int, ...], ...] = ((0, 2, 1), (4, -1, 3)),
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
) -> None:
    """Put rows into blocks of five slots, and look at every row of them."""
    requests, queries, kv_heads = len(places), len(places[0]), 2
    qkv = numbers(requests, queries, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    block = numbers(2, requests, 5, kv_heads, head_dim, dtype=dtype)
    before, given = block.clone(), qkv.clone()
    positions = (torch.arange(requests * queries) * 7 % POSITIONS).view(requests, queries)
    query = append_block(
        qkv,
        query_norm,
        key_norm,
        EPS,
        rotary_table(angles(head_dim)),
        positions,
        torch.tensor(places, dtype=torch.int64),
        block[0],
        block[1],
    )
    assert query.dtype == dtype and query.shape == (requests, queries, heads, head_dim)
    assert torch.equal(qkv, given)
    rows = qkv.view(requests, queries, heads + 2 * kv_heads, head_dim)
    expected, queried = before.double(), torch.empty(query.shape, dtype=torch.float64)
    for r in range(requests):
        for q, place in enumerate(places[r]):
            position = int(positions[r, q])
            for head in range(heads):
                queried[r, q, head] = rotated(rows[r, q, head], query_norm, position)
            for head in range(kv_heads if place >= 0 else 0):
                before[0, r, place, head] = block[0, r, place, head]
                before[1, r, place, head] = rows[r, q, heads + kv_heads + head]
                expected[0, r, place, head] = rotated(rows[r, q, heads + head], key_norm, position)
    assert torch.equal(block, before), "another row has changed, or a value is not what was given"
    bound = tolerance(dtype)
    torch.testing.assert_close(block[0].double(), expected[0], rtol=bound, atol=bound)
    torch.testing.assert_close(query.double(), queried, rtol=bound, atol=bound)


@pytest.mark.parametrize(("query_normed", "key_normed"), [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 64, 96])
def test_queries_and_keys_are_normed_and_rotated(
    head_dim: int, dtype: torch.dtype, query_normed: bool, key_normed: bool
) -> None:
    norms = (1 + numbers(head_dim, seed=1) / 4 if query_normed else None, numbers(head_dim) if key_normed else None)
    check_block(dtype, head_dim, query_norm=norms[0], key_norm=norms[1])


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize(
    "places", [((4, 3, 2, 1, 0),), ((-1,), (0,)), ((-1, -2), (-1, -1)), ((2, -1),)], ids=["all", "one", "none", "pad"]
)
def test_rows_of_any_places(places: tuple[tuple[int, ...], ...], heads: int) -> None:
    check_block(heads=heads, places=places)


# Schemas and refusals


TABLE = rotary_table(angles(4))

CONTEXT: dict[str, Any] = {
    "key": numbers(3, 2, 4),
    "value": numbers(3, 2, 4),
    "key_norm": torch.ones(4),
    "eps": EPS,
    "rotary_table": TABLE,
    "positions": torch.arange(3),
    "slot_mapping": torch.tensor([5, -1, 0]),
    "key_cache": numbers(2, 3, 2, 4),
    "value_cache": numbers(2, 3, 2, 4),
}

ORDER: dict[str, Any] = {
    "observed_at": torch.tensor([[0, 2, 1], [0, 1, 1]], dtype=torch.int32),
    "first_positions": torch.tensor([7, 9]),
}

OPERATORS = {"write_context": CONTEXT, "partition_block": ORDER}


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_operators_keep_to_their_schemas_and_fake_kernels(operator: str) -> None:
    torch.library.opcheck(getattr(ops, operator), tuple(_copied(OPERATORS[operator]).values()))


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: a.clone() if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.mark.parametrize(
    ("operator", "name", "value"),
    [
        ("write_context", "key", CONTEXT["key"][0]),
        ("write_context", "key", _spread(CONTEXT["key"])),
        ("write_context", "key", CONTEXT["key"].double()),
        ("write_context", "value", CONTEXT["value"][:2]),
        ("write_context", "value", _spread(CONTEXT["value"])),
        ("write_context", "key_norm", torch.ones(3)),
        ("write_context", "rotary_table", TABLE[:, :, :2]),
        ("write_context", "rotary_table", TABLE[:, 0]),
        ("write_context", "rotary_table", TABLE.double()),
        ("write_context", "positions", CONTEXT["positions"].int()),
        ("write_context", "positions", CONTEXT["positions"][:2]),
        ("write_context", "positions", torch.tensor([0, 1, POSITIONS])),
        ("write_context", "positions", torch.tensor([0, 1, -1])),
        ("write_context", "slot_mapping", CONTEXT["slot_mapping"].int()),
        ("write_context", "slot_mapping", CONTEXT["slot_mapping"][:2]),
        ("write_context", "slot_mapping", torch.tensor([5, -1, 6])),
        ("write_context", "key_cache", CONTEXT["key_cache"][0]),
        ("write_context", "key_cache", _spread(CONTEXT["key_cache"])),
        ("write_context", "value_cache", CONTEXT["value_cache"][:1]),
        ("partition_block", "observed_at", ORDER["observed_at"].long()),
        ("partition_block", "observed_at", ORDER["observed_at"][0]),
        ("partition_block", "first_positions", ORDER["first_positions"].int()),
        ("partition_block", "first_positions", ORDER["first_positions"][:1]),
    ],
)
def test_wrong_arguments_are_named(compiled: ModuleType, operator: str, name: str, value: torch.Tensor) -> None:
    arguments = _copied(OPERATORS[operator]) | {name: value}
    with pytest.raises(RuntimeError, match=name):
        getattr(compiled, operator)(*arguments.values())
    for key in {"key_cache", "value_cache"} & arguments.keys() - {name}:
        assert torch.equal(arguments[key], OPERATORS[operator][key]), f"{key} has changed although the call was refused"
