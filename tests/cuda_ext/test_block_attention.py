"""Attention over pages and a block, against loops in double precision, and its independence of everything else."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_ext import ops, reference
from tests.cuda_ext.oracle import Case, Recipe, causal, instruction_set, spoil, threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Arithmetic is in float32 whatever the format, and adds up rounding errors; results in 16 bits are rounded once more.
_EPSILONS = {torch.float32: 32, torch.bfloat16: 1, torch.float16: 1}


def tolerance(dtype: torch.dtype) -> float:
    return _EPSILONS[dtype] * torch.finfo(dtype).eps


def check(operations: ModuleType, case: Case, expected: torch.Tensor | None = None) -> None:
    actual = operations.block_attention(*case.arguments)
    assert actual.dtype == case.query.dtype and actual.shape == case.query.shape
    bound = tolerance(case.query.dtype)
    expected = case.expected() if expected is None else expected
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("head_dim", [4, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formats_and_widths(operations: ModuleType, dtype: torch.dtype, head_dim: int) -> None:
    check(operations, Recipe((37, 0, 5), (causal(5),) * 3, 5, head_dim=head_dim, page_size=16, dtype=dtype).make())


@pytest.mark.parametrize("page_size", [1, 3, 16, 32])
def test_contexts_that_end_at_and_beside_page_boundaries(operations: ModuleType, page_size: int) -> None:
    lengths = {0, 1, *(pages * page_size + beside for pages in (1, 2, 3) for beside in (-1, 0, 1))}
    check(operations, Recipe(tuple(lengths), (causal(4),) * len(lengths), 4, page_size=page_size).make())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_contexts(operations: ModuleType, dtype: torch.dtype) -> None:
    lengths = (3000, 255, 256, 257, 513, 0)
    recipe = Recipe(lengths, (causal(5),) * len(lengths), 5, 3, 1, 64, page_size=32, dtype=dtype, interleaved=True)
    check(operations, recipe.make())


@pytest.mark.parametrize("context_lens", [(0,), (0, 0, 0)])
def test_no_context_at_all(operations: ModuleType, context_lens: tuple[int, ...]) -> None:
    check(operations, Recipe(context_lens, (causal(4),) * len(context_lens), 4).make())


@pytest.mark.parametrize(
    "visible",
    [
        ((1,), (1,)),
        (causal(3), causal(3)),
        ((3, 3, 3), (3, 3, 3)),
        (causal(3), (3, 3, 3)),
        ((2, 0, 3), (1, 3, 2)),
        ((0, 0, 0), (2, 1, 1)),
        ((0, 0, 0), (0, 0, 0)),
    ],
    ids=["one slot", "causal", "bidirectional", "mixed", "any", "slots that nobody sees", "no slots"],
)
@pytest.mark.parametrize("context_lens", [(4, 7), (0, 7)], ids=["context", "zero context"])
def test_visible_slots(
    operations: ModuleType, context_lens: tuple[int, ...], visible: tuple[tuple[int, ...], ...]
) -> None:
    check(operations, Recipe(context_lens, visible, len(visible[0])).make())


def test_who_sees_nothing_gets_zeros(operations: ModuleType) -> None:
    case = Recipe((0, 3), ((0, 1), (0, 1)), 2).make()
    output = operations.block_attention(*case.arguments)
    assert output[0, 0].count_nonzero() == 0
    assert bool((output[0, 1] != 0).all()) and bool((output[1] != 0).all())


@pytest.mark.parametrize("visible", [((5,), (3,)), ((2, 5), (1, 4)), ((5, 1, 3), (0, 0, 2))])
def test_fewer_queries_than_slots(operations: ModuleType, visible: tuple[tuple[int, ...], ...]) -> None:
    check(operations, Recipe((4, 7), visible, 5).make())


def test_more_queries_than_slots(operations: ModuleType) -> None:
    check(operations, Recipe((4, 7), ((1, 2, 2, 1, 0),) * 2, 2).make())


def test_more_slots_than_anything_is_tiled_by(operations: ModuleType) -> None:
    check(operations, Recipe((3, 0), (causal(70),) * 2, 70, head_dim=20).make())


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (6, 1), (6, 2), (9, 3), (32, 8)])
def test_query_heads_share_key_heads(operations: ModuleType, heads: int, kv_heads: int) -> None:
    check(operations, Recipe((5, 40), (causal(3),) * 2, 3, heads, kv_heads, 16).make())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_larger_tensors(operations: ModuleType, dtype: torch.dtype, fused: bool, interleaved: bool) -> None:
    recipe = Recipe((9, 0, 33), (causal(4),) * 3, 4, head_dim=64, dtype=dtype)
    plain, views = recipe.make(), replace(recipe, fused=fused, interleaved=interleaved).make()
    assert views.query.is_contiguous() is not fused
    assert views.key_cache.is_contiguous() is not interleaved
    check(operations, views)
    first, second = (operations.block_attention(*case.arguments) for case in (plain, views))
    assert torch.equal(first, second)


@pytest.mark.parametrize("sharpness", [0.0, 30.0, 1e4])
def test_scores_far_apart_and_all_alike(operations: ModuleType, sharpness: float) -> None:
    case = Recipe((600, 7), (causal(4),) * 2, 4, head_dim=16, sharpness=sharpness).make()
    actual = operations.block_attention(*case.arguments)
    # Errors of scores grow with the scores.
    bound = max(1.0, sharpness) * tolerance(torch.float32)
    torch.testing.assert_close(actual.double(), case.expected(), rtol=bound, atol=bound)


def test_a_request_does_not_notice_what_its_neighbour_sees(operations: ModuleType) -> None:
    case = Recipe((5, 5), (causal(4),) * 2, 4).make()
    before = operations.block_attention(*case.arguments)
    spoil(case.block_key[0])
    spoil(case.block_value[0])
    spoil(case.key_cache[case.block_tables[0, :2].long()])
    assert torch.equal(operations.block_attention(*case.arguments)[1], before[1])


def test_requests_may_share_pages(operations: ModuleType) -> None:
    case = Recipe((6, 6), (causal(3),) * 2, 3).make()
    case.block_tables[1] = case.block_tables[0]
    check(operations, case)


def test_the_block_table_may_be_wider_than_any_context(operations: ModuleType) -> None:
    case = Recipe((7, 2), (causal(3),) * 2, 3).make()
    wide = torch.full((2, 40), -7, dtype=torch.int32)
    wide[:, : case.block_tables.shape[1]] = case.block_tables
    expected = operations.block_attention(*case.arguments)
    assert torch.equal(operations.block_attention(*replace(case, block_tables=wide).arguments), expected)


@pytest.mark.parametrize("requests", [0, 1])
def test_nothing_to_do(operations: ModuleType, requests: int) -> None:
    case = Recipe((3,), (causal(2),), 2).make().requests(*range(requests))
    empty = case if requests == 0 else case.queries()
    output = operations.block_attention(*empty.arguments)
    assert output.shape == (requests, 2 - 2 * requests, 4, 4) and output.dtype == torch.float32


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_inputs_stay_as_they_are(operations: ModuleType, interleaved: bool) -> None:
    case = Recipe((4, 0, 300), (causal(3),) * 3, 3, interleaved=interleaved).make()
    tensors = [argument for argument in case.arguments if isinstance(argument, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    operations.block_attention(*case.arguments)
    for tensor, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    requests, slots, queries = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kv_heads, page_size = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 16]))
    seen = st.tuples(*[st.integers(0, slots)] * queries)
    return Recipe(
        draw(st.tuples(*[st.integers(0, 11)] * requests)),
        draw(st.tuples(*[seen] * requests)),
        slots,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 6, 18])),
        page_size=page_size,
        dtype=draw(st.sampled_from(DTYPES)),
        fused=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=1000, deadline=None)
@given(recipe=recipes())
def test_any_case(instruction_sets: list[str], recipe: Recipe) -> None:
    case = recipe.make()
    expected = case.expected()
    check(reference, case, expected)
    check(ops, case, expected)
    for name in instruction_sets:
        with instruction_set(name):
            check(ops, case, expected)


# A token must not depend on who else is served: everything from here on is about equal bits.

BATCH = Recipe(
    (700, 0, 33, 3000, 256, 5), (causal(5),) * 6, 5, heads=9, kv_heads=3, head_dim=64, page_size=32, interleaved=True
)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def batch(request: pytest.FixtureRequest) -> Case:
    return replace(BATCH, dtype=request.param).make()


def same(operations: ModuleType, part: Case, whole: torch.Tensor) -> bool:
    return torch.equal(operations.block_attention(*part.arguments), whole)


def test_a_request_alone_is_what_it_is_in_a_batch(compiled: ModuleType, batch: Case) -> None:
    whole = compiled.block_attention(*batch.arguments)
    for r in range(len(whole)):
        assert same(compiled, batch.requests(r), whole[r : r + 1]), r


@pytest.mark.parametrize("order", [(5, 4, 3, 2, 1, 0), (3, 0), (1, 3, 4), (2, 2, 2, 2), (4, 0, 1, 2, 5)])
def test_neighbours_and_places_in_the_batch_do_not_matter(
    compiled: ModuleType, batch: Case, order: tuple[int, ...]
) -> None:
    whole = compiled.block_attention(*batch.arguments)
    assert same(compiled, batch.requests(*order), whole[list(order)])


def test_threads_do_not_matter(compiled: ModuleType, batch: Case) -> None:
    whole = compiled.block_attention(*batch.arguments)
    with threads(2):
        assert same(compiled, batch, whole)
        for r in range(len(whole)):
            assert same(compiled, batch.requests(r), whole[r : r + 1]), r


@pytest.mark.parametrize("chosen", [(0,), (4,), (2, 3), (1, 3, 4), (4, 3, 2, 1, 0), (3, 3, 3, 3, 3, 3, 3)])
def test_other_queries_do_not_matter(compiled: ModuleType, batch: Case, chosen: tuple[int, ...]) -> None:
    whole = compiled.block_attention(*batch.arguments)
    assert same(compiled, batch.queries(*chosen), whole[:, list(chosen)])


def test_slots_that_a_query_does_not_see_do_not_matter(compiled: ModuleType, batch: Case) -> None:
    whole = compiled.block_attention(*batch.arguments)
    keys, values = batch.block_key[:, :3].contiguous(), batch.block_value[:, :3].contiguous()
    assert same(compiled, replace(batch.queries(0, 1, 2), block_key=keys, block_value=values), whole[:, :3])


def test_a_query_does_not_notice_what_later_queries_see(compiled: ModuleType) -> None:
    case = Recipe((5, 0), (causal(4),) * 2, 4).make()
    before = compiled.block_attention(*case.arguments)
    spoil(case.block_key[:, 2:])
    spoil(case.block_value[:, 2:])
    assert torch.equal(compiled.block_attention(*case.arguments)[:, :2], before[:, :2])


def test_where_the_pages_lie_does_not_matter(compiled: ModuleType, batch: Case) -> None:
    whole = compiled.block_attention(*batch.arguments)
    pages = len(batch.key_cache)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1))
    inside = (batch.block_tables >= 0) & (batch.block_tables < pages)
    tables = torch.where(inside, order.argsort()[batch.block_tables.where(inside, 0).long()], -1).int()
    moved = replace(batch, key_cache=batch.key_cache[order], value_cache=batch.value_cache[order], block_tables=tables)
    assert same(compiled, moved, whole)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=recipes(), data=st.data())
def test_any_request_of_any_batch_alone(compiled: ModuleType, recipe: Recipe, data: st.DataObject) -> None:
    case = recipe.make()
    whole = compiled.block_attention(*case.arguments)
    r = data.draw(st.integers(0, len(recipe.context_lens) - 1))
    q = data.draw(st.integers(0, len(recipe.visible[0]) - 1))
    assert same(compiled, case.requests(r).queries(q), whole[r : r + 1, q : q + 1])


def test_the_operator_keeps_to_its_schema_and_its_fake_kernel() -> None:
    torch.library.opcheck(ops.block_attention, Recipe((5, 0), (causal(3),) * 2, 4, interleaved=True).make().arguments)


GOOD = Recipe((5, 3), (causal(3),) * 2, 3).make()


def wrong(**arguments: torch.Tensor) -> Any:
    """An argument that does not go with those of ``GOOD``, and the name that the message should hold."""
    return next(iter(arguments)), next(iter(arguments.values()))


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with gaps between them."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        wrong(query=GOOD.query[0]),
        wrong(query=torch.zeros(2, 3, 5, 4)),
        wrong(query=GOOD.query.double()),
        wrong(query=spread(GOOD.query)),
        wrong(block_key=GOOD.block_key[:1]),
        wrong(block_key=GOOD.block_key[..., :2]),
        wrong(block_key=spread(GOOD.block_key)),
        wrong(block_key=GOOD.block_key.half()),
        wrong(block_value=GOOD.block_value[:, :2]),
        wrong(block_value=spread(GOOD.block_value)),
        wrong(key_cache=GOOD.key_cache[:, :, :1]),
        wrong(key_cache=spread(GOOD.key_cache)),
        wrong(value_cache=GOOD.value_cache[:, :2]),
        wrong(value_cache=spread(GOOD.value_cache)),
        wrong(value_cache=GOOD.value_cache.bfloat16()),
        wrong(block_tables=GOOD.block_tables.long()),
        wrong(block_tables=GOOD.block_tables[0]),
        wrong(block_tables=GOOD.block_tables[:1]),
        wrong(block_tables=spread(GOOD.block_tables)),
        wrong(block_tables=ids([0, len(GOOD.key_cache)], [1, 2])),
        wrong(block_tables=ids([0, 3], [-1, 2])),
        wrong(context_lens=GOOD.context_lens.long()),
        wrong(context_lens=GOOD.context_lens[:1]),
        wrong(context_lens=torch.tensor([5, -1], dtype=torch.int32)),
        wrong(context_lens=torch.tensor([5, 300], dtype=torch.int32)),
        wrong(visible=GOOD.visible.long()),
        wrong(visible=GOOD.visible[:, :2]),
        wrong(visible=ids([1, 2, 4], [1, 2, 3])),
        wrong(visible=ids([1, 2, -1], [1, 2, 3])),
    ],
)
def test_wrong_arguments_are_named(compiled: ModuleType, name: str, value: Any) -> None:
    with pytest.raises(RuntimeError, match=name):
        compiled.block_attention(*replace(GOOD, **{name: value}).arguments)


def test_a_refusal_says_what_was_given_and_what_was_expected(compiled: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="visible is 4 .* expected 0 to 3"):
        compiled.block_attention(*replace(GOOD, visible=ids([1, 2, 4], [1, 2, 3])).arguments)


def test_heads_that_are_too_wide_are_refused(compiled: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="head_dim is 260, expected 1 to 256"):
        compiled.block_attention(*Recipe((1,), (causal(1),), 1, head_dim=260).make().arguments)
