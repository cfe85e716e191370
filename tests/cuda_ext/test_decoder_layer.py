"""Whole decoder layers of the target and of the drafter in one call, against dense attention in double precision."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext import ops, reference
from cuda_ext.linear import WeightFormat
from tests.cuda_ext.layer_oracle import expected
from tests.cuda_ext.layers import Case, DecoderRecipe, DraftRecipe, Formats, LayerShape, Outcome, run
from tests.cuda_ext.oracle import instruction_set
from tests.cuda_ext.weights import BLOCKED, FORMATS, make

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSE = tuple(format for format in FORMATS if format not in BLOCKED)

Recipe = DecoderRecipe | DraftRecipe

# A prompt, a prompt's middle and a token; blocks with slots in any order, one of which is not stored.
MIXED = DecoderRecipe(((0, 7), (9, 4), (12, 1)))
BLOCKS = DraftRecipe((6, 0, 33), ((0, 1, 2), (2, -1, 0), (4, 3, 1)), 5, visible=((1, 2, 3), (3, 3, 2), (5, 4, 0)))
RECIPES = {"decoder": MIXED, "draft": BLOCKS}
EVERY_RECIPE = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def tolerance(dtype: torch.dtype) -> float:
    """Five float32 sums follow each other; 16 bits round keys, values and, in the reference, what attention does."""
    return (128 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers that are equal where all is equal, NaN included."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def check(operations: ModuleType, case: Case, wanted: Outcome | None = None) -> None:
    """The call gives what the oracle does, writes what it should and changes nothing else."""
    tensors = {name: value for name, value in case.arguments.items() if isinstance(value, torch.Tensor)}
    before = {name: value.clone() for name, value in tensors.items()}
    actual, wanted = run(operations, case), wanted or expected(case)
    bound = tolerance(case[case.written[0]].dtype)
    for part in ("output", "stream"):
        mine = getattr(actual, part)
        assert mine.dtype == torch.float32 and mine.shape == case["hidden"].shape
        torch.testing.assert_close(mine.double(), getattr(wanted, part), rtol=bound, atol=bound)
    kept = ~case.written_rows
    for name, part in zip(case.written, ("keys", "values"), strict=True):
        mine, theirs = getattr(actual, part), getattr(wanted, part)
        torch.testing.assert_close(mine.double(), theirs, rtol=bound, atol=bound, equal_nan=True)
        assert torch.equal(bits(mine[kept]), bits(before[name][kept])), f"{name} has changed in other rows"
    for name, value in tensors.items():
        assert torch.equal(bits(value), bits(before[name])), f"{name} has changed"


# What layers are like


@EVERY_RECIPE
@pytest.mark.parametrize(
    "formats",
    [
        *((format,) * 4 for format in FORMATS),
        (WeightFormat.Q4_1, WeightFormat.Q4_1, WeightFormat.Q4_1, WeightFormat.Q8_0),
        (WeightFormat.INT8, WeightFormat.FLOAT32, WeightFormat.Q8_0, WeightFormat.FLOAT16),
    ],
    ids=lambda formats: "-".join(dict.fromkeys(formats)),
)
def test_weights(operations: ModuleType, recipe: Recipe, formats: Formats) -> None:
    check(operations, replace(recipe, shape=LayerShape(formats=formats)).make())


@EVERY_RECIPE
@pytest.mark.parametrize("head_dim", [2, 8, 64, 80, 96, 128, 256])
def test_widths_of_heads(operations: ModuleType, recipe: Recipe, head_dim: int) -> None:
    check(operations, replace(recipe, shape=LayerShape(head_dim=head_dim)).make())


@EVERY_RECIPE
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (3, 1), (8, 1), (9, 3), (16, 2), (50, 1)])
def test_query_heads_share_key_heads(operations: ModuleType, recipe: Recipe, heads: int, kv_heads: int) -> None:
    check(operations, replace(recipe, shape=LayerShape(heads, kv_heads, head_dim=8)).make())


@EVERY_RECIPE
@pytest.mark.parametrize(("hidden", "intermediate"), [(1, 16), (7, 48), (16, 16), (100, 272), (600, 1536)])
def test_widths_of_layers(operations: ModuleType, recipe: Recipe, hidden: int, intermediate: int) -> None:
    check(operations, replace(recipe, shape=LayerShape(hidden=hidden, intermediate=intermediate)).make())


@EVERY_RECIPE
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_styles(operations: ModuleType, recipe: Recipe, qkv_bias: bool, head_norms: bool, residual: bool) -> None:
    shape = LayerShape(qkv_bias=qkv_bias, head_norms=head_norms)
    check(operations, replace(recipe, shape=shape, residual=residual).make())


@EVERY_RECIPE
@pytest.mark.parametrize("kept", ["query_norm", "key_norm"])
def test_one_norm_of_heads_alone(operations: ModuleType, recipe: Recipe, kept: str) -> None:
    case = replace(recipe, shape=LayerShape(head_norms=True)).make()
    norms = {"query_norm": None, "key_norm": None, kept: case[kept]}
    one = replace(case.shape.weights, query_norm=norms["query_norm"], key_norm=norms["key_norm"])
    check(operations, replace(case, arguments=case.arguments | norms), expected(case, one))


@EVERY_RECIPE
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formats_and_layouts_of_caches(
    operations: ModuleType, recipe: Recipe, dtype: torch.dtype, interleaved: bool
) -> None:
    case = replace(recipe, dtype=dtype, interleaved=interleaved).make()
    assert case["key_cache"].is_contiguous() is not interleaved
    check(operations, case)


def test_an_inner_width_that_is_no_number_of_panels_is_refused() -> None:
    weights = LayerShape().weights
    with pytest.raises(ValueError, match="intermediate is 24, expected a multiple of 16"):
        replace(weights, down=make(WeightFormat.FLOAT32, 64, 24))


# Who is in the batch


@pytest.mark.parametrize("page_size", [1, 5, 32])
def test_contexts_that_end_at_and_beside_borders_of_pages_and_chunks(operations: ModuleType, page_size: int) -> None:
    borders = (0, page_size, 2 * page_size, 256, 512)
    lengths = sorted({border + beside for border in borders for beside in (-1, 0, 1) if border + beside >= 0})
    check(operations, DecoderRecipe(tuple((length, 1) for length in lengths), page_size=page_size).make())
    blocks = tuple((0, 1) for _ in lengths)
    check(operations, DraftRecipe(tuple(lengths), blocks, 2, page_size=page_size).make())


@pytest.mark.parametrize(
    "requests",
    [
        ((0, 1),),
        ((0, 300),),
        ((250, 20), (0, 3)),
        ((699, 1), (500, 1), (3, 1)),
        ((200, 100), (600, 1), (0, 17), (40, 5)),
    ],
    ids=["one token", "long prompt", "across a border", "decodes", "mixture"],
)
def test_prompts_and_decodes(operations: ModuleType, requests: tuple[tuple[int, int], ...]) -> None:
    check(operations, DecoderRecipe(requests, LayerShape(9, 3, 64), page_size=32).make())


@pytest.mark.parametrize("padding", [0, 1, 20])
@pytest.mark.parametrize("unstored", [(), (0,), (6, 7, 11)])
def test_padding_and_tokens_without_a_slot(operations: ModuleType, padding: int, unstored: tuple[int, ...]) -> None:
    check(operations, replace(MIXED, padding=padding, unstored=unstored).make())


@pytest.mark.parametrize(
    "recipe",
    [
        DecoderRecipe(()),
        DecoderRecipe((), padding=3),
        DecoderRecipe(((4, 0), (0, 0), (3, 2), (9, 0))),
        DecoderRecipe(((4, 0),), padding=2),
        DraftRecipe((), (), 3),
        DraftRecipe((3,), ((),), 3),
        DraftRecipe((0,), ((-1,),), 0, ((0,),)),
        DraftRecipe((0, 4), ((-1, 2), (-1, -1)), 3, ((0, 0), (0, 0))),
    ],
    ids=[
        "no requests",
        "only padding",
        "requests without tokens",
        "padding without tokens",
        "no blocks",
        "no rows",
        "no slots",
        "rows that see nothing",
    ],
)
def test_little_or_nothing_to_do(operations: ModuleType, recipe: Recipe) -> None:
    check(operations, recipe.make())


@pytest.mark.parametrize("places", [((5, 3, 1), (0, 2, 4)), ((-1, 2, -1), (-1, -1, -1))], ids=["any order", "few"])
def test_any_places_and_any_sight(operations: ModuleType, places: tuple[tuple[int, ...], ...]) -> None:
    check(operations, DraftRecipe((20, 270), places, 6, ((6, 6, 6), (0, 5, 3))).make())


def test_requests_may_share_pages(operations: ModuleType) -> None:
    case = DecoderRecipe(((10, 2), (11, 3)), page_size=5).make()
    case["block_tables"][1, :2] = case["block_tables"][0, :2]
    check(operations, case)


@EVERY_RECIPE
def test_block_tables_may_be_part_of_wider_ones(operations: ModuleType, recipe: Recipe) -> None:
    case = recipe.make()
    tables = case["block_tables"]
    part = torch.cat([tables, torch.full_like(tables, -7)], dim=1)[:, : tables.shape[1]]
    check(operations, replace(case, arguments=case.arguments | {"block_tables": part}))


@EVERY_RECIPE
def test_what_one_request_holds_stays_in_it(operations: ModuleType, recipe: Recipe) -> None:
    """The caches' unused rows hold NaN in every test here; this one is about the rows themselves."""
    case = recipe.make()
    clean = run(operations, case)
    mine = slice(7, 11) if case.operator == "decoder_layer" else slice(1, 2)
    case["hidden"][mine] = torch.nan
    spoilt = run(operations, case)
    others = torch.ones(len(case["hidden"]), dtype=torch.bool)
    others[mine] = False
    assert bool(spoilt.output[mine].isnan().all())
    torch.testing.assert_close(spoilt.output[others], clean.output[others], rtol=0, atol=0)
    torch.testing.assert_close(spoilt.stream[others], clean.stream[others], rtol=0, atol=0)


@st.composite
def shapes(draw: st.DrawFn) -> LayerShape:
    kv_heads, blocked = draw(st.integers(1, 3)), draw(st.booleans())
    formats = st.sampled_from(FORMATS if blocked else DENSE)
    return LayerShape(
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 8])),
        kv_heads=kv_heads,
        head_dim=32 if blocked else draw(st.sampled_from([2, 8, 20, 64, 96])),
        hidden=draw(st.sampled_from([32, 64] if blocked else [5, 32, 50])),
        intermediate=draw(st.sampled_from([32, 96] if blocked else [16, 80])),
        formats=draw(st.tuples(formats, formats, formats, formats)),
        qkv_bias=draw(st.booleans()),
        head_norms=draw(st.booleans()),
    )


def common(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "shape": draw(shapes()),
        "page_size": draw(st.sampled_from([1, 3, 5, 32])),
        "residual": draw(st.booleans()),
        "interleaved": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


LENGTHS = st.one_of(st.integers(0, 12), st.sampled_from([31, 32, 33, 255, 256, 257, 300, 700]))


@st.composite
def decoder_recipes(draw: st.DrawFn) -> DecoderRecipe:
    requests = draw(st.lists(st.tuples(LENGTHS, st.one_of(st.integers(0, 6), st.just(40))), max_size=4).map(tuple))
    tokens = sum(new for _, new in requests)
    unstored = draw(st.sets(st.integers(0, tokens - 1), max_size=3)) if tokens else ()
    return DecoderRecipe(requests, padding=draw(st.integers(0, 3)), unstored=tuple(unstored), **common(draw))


@st.composite
def draft_recipes(draw: st.DrawFn) -> DraftRecipe:
    lengths = draw(st.lists(LENGTHS, min_size=1, max_size=3).map(tuple))
    slots, queries = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    order = st.permutations([*range(slots), *[-1] * queries]).map(lambda places: tuple(places[:queries]))
    seen = st.tuples(*[st.integers(0, slots)] * queries)
    places, visible = (draw(st.tuples(*[part] * len(lengths))) for part in (order, seen))
    return DraftRecipe(lengths, places, slots, visible, **common(draw))


@settings(max_examples=100, deadline=None)
@given(recipe=st.one_of(decoder_recipes(), draft_recipes()))
def test_any_case(instruction_sets: list[str], recipe: Recipe) -> None:
    case = recipe.make()
    wanted = expected(case)
    check(reference, case, wanted)
    check(ops, case, wanted)
    for name in instruction_sets:
        with instruction_set(name):
            check(ops, case, wanted)
