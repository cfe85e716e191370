"""Small inputs of block attention that between them reach every path of the CUDA kernels."""

import random
from dataclasses import replace

import torch

from tests.cuda_ext.host_shim.runner import DTYPES
from tests.cuda_ext.oracle import Case, Recipe, causal

HEAD_DIMS = (64, 80, 96, 128, 256)

# One request and one kv head, where nothing else is asked for: threads of the host are slow.
_ONE = Recipe(
    (5,), (causal(3),), 3, heads=1, kv_heads=1, head_dim=64, page_size=16, dtype=torch.bfloat16, interleaved=True
)


def _lengths(*context_lens: int, dtype: torch.dtype, page_size: int = 16, queries: int = 2) -> Case:
    shape = replace(_ONE, context_lens=context_lens, visible=(causal(queries),) * len(context_lens), slots=queries)
    return replace(shape, page_size=page_size, dtype=dtype).make()


def _visible(*visible: tuple[int, ...], slots: int, context_lens: tuple[int, ...] = (4, 0)) -> Case:
    return replace(_ONE, context_lens=context_lens, visible=visible, slots=slots, heads=2).make()


def _formats() -> dict[str, Case]:
    shape = replace(_ONE, context_lens=(37, 0), visible=(causal(5),) * 2, slots=5, heads=4, kv_heads=2, fused=True)
    return {
        f"{dtype}, head_dim {head_dim}": replace(shape, dtype=dtype, head_dim=head_dim).make()
        for dtype in DTYPES
        for head_dim in HEAD_DIMS
    }


def _boundaries() -> dict[str, Case]:
    float32, bfloat16, float16 = DTYPES
    return {
        "pages of 1": _lengths(1, 2, 3, dtype=float32, page_size=1),
        "pages of 3": _lengths(2, 3, 4, 5, 6, 7, 33, dtype=bfloat16, page_size=3),
        "pages of 32": _lengths(31, 32, 33, 63, 64, 65, dtype=float16, page_size=32),
        "tiles": _lengths(31, 32, 33, 63, 64, 65, 97, dtype=float32, queries=1),
        "first chunk": _lengths(255, 256, 257, 258, dtype=bfloat16),
        "later chunks": _lengths(513, dtype=float32, page_size=32, queries=1),
        "chunks that are dealt out": _lengths(2100, 0, 300, dtype=bfloat16, page_size=64),
        "chunks of two sizes": _lengths(2560, 2561, dtype=float16, page_size=64, queries=1),
        "wide rows in several chunks": replace(_ONE, context_lens=(300, 0), visible=((2,), (1,)), head_dim=256).make(),
        "no context": _lengths(0, 0, dtype=bfloat16),
    }


def _blocks() -> dict[str, Case]:
    return {
        "one slot": _visible((1,), (1,), slots=1),
        "bidirectional": _visible((3, 3, 3), (3, 3, 3), slots=3),
        "any visible slots": _visible((2, 0, 3), (1, 3, 0), slots=3),
        "nothing visible": _visible((0, 0), (0, 0), slots=2),
        "nothing visible behind two chunks": _visible((0, 0), (0, 1), slots=2, context_lens=(257, 0)),
        "no slots": _visible((0,), (0,), slots=0),
        "fewer queries than slots": _visible((5,), (3,), slots=5),
        "more queries than slots": _visible((1, 2, 2, 1, 0), (2, 2, 2, 2, 2), slots=2),
        "slots of several tiles": _visible(causal(70), causal(70), slots=70),
        "no requests": _lengths(3, dtype=torch.float32).requests(),
        "no queries": _lengths(3, dtype=torch.float32).queries(),
    }


def _heads() -> dict[str, Case]:
    cases = {}
    for heads, kv_heads, queries in ((3, 3, 3), (6, 1, 2), (9, 3, 5), (8, 2, 16), (13, 1, 5), (8, 1, 20)):
        shape = replace(_ONE, context_lens=(40, 3), visible=(causal(queries),) * 2, slots=queries)
        name = f"{heads} heads, {kv_heads} kv heads, {queries} queries"
        cases[name] = replace(shape, heads=heads, kv_heads=kv_heads).make()
    return cases


def _scores() -> dict[str, Case]:
    shape = replace(_ONE, context_lens=(300, 7), visible=((2,), (1,)), slots=2)
    return {f"sharpness {value:g}": replace(shape, sharpness=value).make() for value in (0.0, 30.0)}


def _random(count: int) -> dict[str, Case]:
    draw = random.Random(0)
    cases = {}
    for index in range(count):
        requests, slots, queries = draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 9)
        kv_heads = draw.randint(1, 2)
        recipe = Recipe(
            tuple(draw.choice((0, draw.randint(1, 40), draw.randint(1, 150))) for _ in range(requests)),
            tuple(tuple(draw.randint(0, slots) for _ in range(queries)) for _ in range(requests)),
            slots,
            heads=kv_heads * draw.randint(1, 4),
            kv_heads=kv_heads,
            head_dim=draw.choice(HEAD_DIMS[:2]),
            page_size=draw.choice((1, 5, 16)),
            dtype=draw.choice(DTYPES),
            fused=draw.random() < 0.5,
            interleaved=draw.random() < 0.5,
            seed=index,
        )
        cases[f"random {index}"] = recipe.make()
    return cases


CASES = {**_formats(), **_boundaries(), **_blocks(), **_heads(), **_scores(), **_random(16)}

# What sanitizers look at: one head dimension, since compiling takes long, and a few cases of each kind.
WATCHED = (
    *(f"{dtype}, head_dim 64" for dtype in DTYPES),
    "first chunk",
    "chunks that are dealt out",
    "nothing visible behind two chunks",
    "slots of several tiles",
    "8 heads, 1 kv heads, 20 queries",
)

# Neighbours in one batch: of one and of several chunks, without context, and a row that sees nothing.
BATCH = replace(
    _ONE,
    context_lens=(270, 0, 33, 5),
    visible=(causal(4), (0, 1, 2, 4), causal(4), (4, 4, 4, 4)),
    slots=4,
    heads=3,
    fused=True,
)
