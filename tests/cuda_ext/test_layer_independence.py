"""A token's row must not depend on who else is served nor on how its prompt was cut: everything here is equal bits."""

import os
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_ext.linear import WeightFormat
from tests.cuda_ext.layers import Case, DraftRecipe, LayerShape, run
from tests.cuda_ext.oracle import threads
from tests.cuda_ext.serving import LONGEST, Plan, Serving, Work, alone, serve

FULL = os.environ.get("SLIPSTREAM_TEST_FULL") == "1"
EXAMPLES = 1000 if FULL else 25

Q4_1, Q8_0, FLOAT32 = WeightFormat.Q4_1, WeightFormat.Q8_0, WeightFormat.FLOAT32
SHAPES = {
    "small": LayerShape(),
    "smollm": LayerShape(9, 3, 64, 64, 128, (Q4_1, Q4_1, Q4_1, Q8_0)),
    "qwen": LayerShape(
        8, 1, 20, 40, 48, (WeightFormat.FLOAT16, FLOAT32, WeightFormat.INT8, WeightFormat.BFLOAT16), True, True
    ),
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> LayerShape:
    return SHAPES[request.param]


def check(operations: ModuleType, shape: LayerShape, serving: Serving, dtype: torch.dtype = torch.float32) -> None:
    """Every request was served to its end and is what it is alone with its whole prompt in one step."""
    for request, text in enumerate(serving.texts):
        assert serving.left(request) == 0
        assert serving.served(request).equals(alone(operations, shape, text, dtype)), request


CUTS: dict[str, tuple[int, ...]] = {
    "token by token": (1,),
    "draft blocks": (5, 1, 3),
    "steps of an engine": (96,),
    "chunks of attention": (256,),
    "beside chunks": (255, 2, 255),
    "beside slabs": (257,),
    "prompt, then tokens": (513, *[1] * LONGEST),
    "short prompt, then tokens": (40, *[1] * LONGEST),
    "tokens, then all": (3, 1, LONGEST),
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_how_a_prompt_is_cut_does_not_matter(compiled: ModuleType, shape: LayerShape, cuts: tuple[int, ...]) -> None:
    serving = Serving(compiled, shape, [LONGEST])
    serve(serving, [Plan(LONGEST, cuts)])
    check(compiled, shape, serving)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nor_does_it_with_caches_of_16_bits(compiled: ModuleType, dtype: torch.dtype) -> None:
    serving = Serving(compiled, SHAPES["small"], [300, 520], dtype=dtype)
    serve(serving, [Plan(300, (1,)), Plan(520, (250, 3), arrival=2)])
    check(compiled, SHAPES["small"], serving, dtype)


@pytest.mark.parametrize("length", [1, 2, 32, 33, 255, 256, 257, 513])
def test_a_shorter_prompt_is_the_beginning_of_a_longer_one(
    compiled: ModuleType, shape: LayerShape, length: int
) -> None:
    serving = Serving(compiled, shape, [length])
    serving.step(Work(0, length))
    check(compiled, shape, serving)


BATCH = (
    Plan(560, (256,)),
    Plan(20, (20,)),
    Plan(300, (290, *[1] * LONGEST), arrival=1),
    Plan(1, (1,), arrival=2),
    Plan(257, (4,), arrival=2),
    Plan(LONGEST, (LONGEST,), arrival=5),
    Plan(70, (64, *[1] * LONGEST), arrival=5),
)


def together(operations: ModuleType, shape: LayerShape, **changes: int) -> Serving:
    """The requests of ``BATCH``: prefills, their parts and decodes in the same steps."""
    serving = Serving(operations, shape, [plan.length for plan in BATCH], layout=changes.get("layout", 0))
    serve(serving, BATCH, bool(changes.get("newest_first")), changes.get("padding", 0))
    return serving


def test_neighbours_do_not_matter(compiled: ModuleType, shape: LayerShape) -> None:
    check(compiled, shape, together(compiled, shape))


@pytest.mark.parametrize("changes", [{"newest_first": 1}, {"padding": 7}, {"layout": 1}], ids=lambda it: next(iter(it)))
def test_order_padding_and_pages_do_not_matter(
    compiled: ModuleType, shape: LayerShape, changes: dict[str, int]
) -> None:
    check(compiled, shape, together(compiled, shape, **changes))


def test_threads_do_not_matter(compiled: ModuleType, shape: LayerShape) -> None:
    expected = [alone(compiled, shape, request) for request in range(len(BATCH))]
    with threads(2):
        batch = together(compiled, shape)
        whole = Serving(compiled, shape, [LONGEST])
        whole.step(Work(0, LONGEST))
    for request, served in enumerate(expected):
        assert batch.served(request).equals(served), request
    assert whole.served(0).equals(expected[0])


@pytest.mark.parametrize("page_size", [1, 5, 48])
def test_the_size_of_pages_does_not_matter(compiled: ModuleType, shape: LayerShape, page_size: int) -> None:
    serving = Serving(compiled, shape, [530, 40], page_size)
    serve(serving, [Plan(530, (300, 1, 1, 100)), Plan(40, (7,))])
    check(compiled, shape, serving)


@pytest.mark.parametrize(("drafts", "accepted"), [(1, 1), (4, 1), (4, 3), (8, 2)])
def test_verified_rows_are_those_of_decoding_one_by_one(
    compiled: ModuleType, shape: LayerShape, drafts: int, accepted: int
) -> None:
    """Whatever stood in the rows of rejected draft tokens, and in their slots."""
    lengths = [300, 530, 90]
    cuts = [(length - 50, *[accepted] * LONGEST) for length in lengths]
    serving = Serving(compiled, shape, lengths)
    serve(serving, [Plan(length, cut, rejected=drafts) for length, cut in zip(lengths, cuts, strict=True)])
    check(compiled, shape, serving)


def test_a_shared_beginning_does_not_matter(compiled: ModuleType, shape: LayerShape) -> None:
    serving = Serving(compiled, shape, [320, 600, 40], texts=[5, 5, 2])
    serving.step(Work(2, 40), Work(0, 290))
    serving.share(0, 1, 288)
    for count in (1, 1, 28):
        serving.step(Work(0, count), Work(1, 104))
    check(compiled, shape, serving)


def test_a_page_of_somebody_else_may_hold_anything(compiled: ModuleType) -> None:
    shape = SHAPES["small"]
    serving = Serving(compiled, shape, [280, 40])
    serving.step(Work(0, 270), Work(1, 30))
    pages = serving.pages
    pages.write(pages.slots(0, 0, 270), torch.full((270, 2, shape.kv_heads, shape.head_dim), torch.nan))
    serving.step(Work(0, 10), Work(1, 10))
    assert serving.served(1).equals(alone(compiled, shape, 1))
    assert bool(serving.served(0).rows[270:].isnan().all())


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    near = st.sampled_from([256, 512]).flatmap(lambda border: st.integers(border - 3, border + 3))
    cut = st.one_of(st.integers(1, 6), st.integers(30, 34), near, st.integers(1, LONGEST))
    length = draw(st.one_of(st.integers(1, 40), near, st.integers(1, LONGEST)))
    cuts = (*draw(st.lists(cut, max_size=12)), LONGEST)
    return Plan(length, cuts, draw(st.integers(0, 4)), draw(st.integers(0, 4)))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    schedule=st.lists(plans(), min_size=1, max_size=5),
    name=st.sampled_from(list(SHAPES)),
    page_size=st.sampled_from([3, 16, 32]),
    newest_first=st.booleans(),
    padding=st.sampled_from([0, 0, 5]),
    count=st.sampled_from([1, 2]),
)
def test_any_schedule(
    compiled: ModuleType,
    schedule: list[Plan],
    name: str,
    page_size: int,
    newest_first: bool,
    padding: int,
    count: int,
) -> None:
    shape = SHAPES[name]
    serving = Serving(compiled, shape, [plan.length for plan in schedule], page_size, layout=padding)
    with threads(count):
        serve(serving, schedule, newest_first, padding)
    check(compiled, shape, serving)


# The drafter's slots

BLOCKS = DraftRecipe(
    (700, 0, 33, 256, 5, 530),
    ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, -1, 0, 3, -1), (0, 1, 2, 3, 4), (3, 4, 0, 2, 1)),
    6,
    page_size=32,
)


@pytest.fixture
def blocks(shape: LayerShape) -> Case:
    return replace(BLOCKS, shape=shape).make()


def part(case: Case, requests: Sequence[int], queries: Sequence[int]) -> Case:
    """The same call with only some rows of some requests, whose blocks hold what ``case`` was given."""
    chosen = torch.tensor(requests, dtype=torch.int64)
    rows = {name: case[name][chosen][:, list(queries)] for name in ("hidden", "residual", "positions")}
    rows |= {name: case[name][chosen][:, list(queries)].contiguous() for name in ("places", "visible")}
    whole = {name: case[name][chosen] for name in ("block_key", "block_value", "block_tables", "context_lens")}
    return replace(case, arguments=case.arguments | rows | whole)


def test_blocks_do_not_notice_their_neighbours(compiled: ModuleType, blocks: Case) -> None:
    whole = run(compiled, blocks)
    everything = range(5)
    for chosen in ([0], [1], [2], [3], [4], [5], [5, 4, 3, 2, 1, 0], [3, 0], [2, 2, 2, 2]):
        for count in (1, 2):
            with threads(count):
                alone_ = run(compiled, part(blocks, chosen, everything))
            assert torch.equal(alone_.output, whole.output[chosen]), (chosen, count)
            assert torch.equal(alone_.stream, whole.stream[chosen]), (chosen, count)
            for name in ("keys", "values"):
                one, two = getattr(alone_, name), getattr(whole, name)[chosen]
                torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("queries", [(0,), (4,), (2, 3), (4, 2, 1), (3, 3, 3, 3, 3, 3, 3)])
def test_slots_do_not_notice_which_others_run(compiled: ModuleType, blocks: Case, queries: tuple[int, ...]) -> None:
    """Those that do not run are in the block already."""
    whole = run(compiled, blocks)
    filled = replace(blocks, arguments=blocks.arguments | {"block_key": whole.keys, "block_value": whole.values})
    some = run(compiled, part(filled, range(6), queries))
    assert torch.equal(some.output, whole.output[:, list(queries)])
    assert torch.equal(some.stream, whole.stream[:, list(queries)])
    torch.testing.assert_close(some.keys, whole.keys, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("page_size", [1, 5])
def test_blocks_do_not_notice_where_their_context_lies(compiled: ModuleType, shape: LayerShape, page_size: int) -> None:
    one, other = (replace(BLOCKS, shape=shape, page_size=size).make() for size in (32, page_size))
    assert torch.equal(run(compiled, one).output, run(compiled, other).output)
