"""What the operators of whole layers refuse, and how; their schemas and fake kernels."""

from types import ModuleType
from typing import Any

import pytest
import torch

from cuda_ext import ops
from cuda_ext.linear import WeightFormat
from tests.cuda_ext.layers import POSITIONS, Case, DecoderRecipe, DraftRecipe, LayerShape

SHAPE = LayerShape(
    formats=(WeightFormat.FLOAT32, WeightFormat.INT8, WeightFormat.Q4_1, WeightFormat.FLOAT32),
    qkv_bias=True,
    head_norms=True,
)
DECODER = DecoderRecipe(((3, 2), (0, 4)), SHAPE, padding=1).make()
DRAFT = DraftRecipe((6, 3), ((0, 1, 2), (2, -1, 4)), 5, ((1, 2, 3), (3, 3, 5)), SHAPE).make()
CASES = {case.operator: case for case in (DECODER, DRAFT)}

# An argument's name, a wrong value and, unless it is that name, what the message should hold.
Row = tuple[Any, ...]

SLOTS = DECODER["key_cache"].shape[0] * DECODER["key_cache"].shape[1]


def clean(case: Case) -> tuple[Any, ...]:
    """The arguments with numbers in place of traps, which the checks would take for differences."""
    return tuple(
        value.nan_to_num(0, 0, 0) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in case.copied().values()
    )


@pytest.mark.parametrize("operator", CASES)
def test_the_operators_keep_to_their_schemas_and_fake_kernels(operator: str) -> None:
    torch.library.opcheck(getattr(ops, operator), clean(CASES[operator]))


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with gaps between them."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def ids(*rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def changed(case: Case, name: str, index: int, value: Any) -> list[Any]:
    """A list argument with one entry replaced."""
    return [value if i == index else entry for i, entry in enumerate(case[name])]


def both(case: Case) -> list[Row]:
    """Wrong arguments that both operators take."""
    panels, scales, table = case["panels"], case["scales"], case["rotary_table"]
    return [
        ("hidden", case["hidden"].double()),
        ("hidden", spread(case["hidden"])),
        ("hidden", case["hidden"][0]),
        ("hidden", case["hidden"][..., :60].contiguous()),
        ("residual", case["residual"][:1]),
        ("residual", case["residual"].half()),
        ("residual", spread(case["residual"])),
        ("positions", case["positions"].int()),
        ("positions", case["positions"][:1]),
        ("positions", spread(case["positions"])),
        ("positions", case["positions"] + POSITIONS),
        ("positions", case["positions"] - POSITIONS),
        ("key_cache", case["key_cache"][0]),
        ("key_cache", spread(case["key_cache"])),
        ("key_cache", case["key_cache"].double()),
        ("value_cache", case["value_cache"][:, :2]),
        ("value_cache", case["value_cache"][..., :8]),
        ("value_cache", spread(case["value_cache"])),
        ("value_cache", case["value_cache"].half()),
        ("block_tables", case["block_tables"].long()),
        ("block_tables", case["block_tables"][0]),
        ("block_tables", case["block_tables"][:1]),
        ("block_tables", spread(case["block_tables"])),
        ("block_tables", torch.full_like(case["block_tables"], len(case["key_cache"]))),
        ("block_tables", torch.full_like(case["block_tables"], -1)),
        ("context_lens", case["context_lens"].long()),
        ("context_lens", ids(-1, 4)),
        ("context_lens", ids(5, 300)),
        ("rotary_table", table[:, :, :8].contiguous()),
        ("rotary_table", table[:, 0]),
        ("rotary_table", table.double()),
        ("rotary_table", spread(table)),
        ("input_norm", case["input_norm"][:60]),
        ("input_norm", case["input_norm"][None]),
        ("input_norm", case["input_norm"].double()),
        ("post_norm", case["post_norm"][:60]),
        ("post_norm", case["post_norm"].double()),
        ("post_norm", spread(case["post_norm"])),
        ("panels", panels[:3]),
        ("panels", changed(case, "panels", 0, panels[0][:-1])),
        ("panels", changed(case, "panels", 1, panels[1][None])),
        ("panels", changed(case, "panels", 2, panels[2].view(torch.int8))),
        ("panels", changed(case, "panels", 3, torch.cat([panels[3], panels[3]])[::2])),
        ("scales", [*scales, torch.empty(0)]),
        ("scales", changed(case, "scales", 0, torch.ones(128)), "scales is given"),
        ("scales", changed(case, "scales", 1, torch.empty(0)), "scales is missing"),
        ("scales", changed(case, "scales", 1, scales[1][:-1])),
        ("scales", changed(case, "scales", 1, scales[1].double())),
        ("formats", case["formats"][:3]),
        ("formats", changed(case, "formats", 2, "float8"), "format is float8"),
        ("formats", changed(case, "formats", 0, "float16"), "panels"),
        ("heads", 0, "heads is 0"),
        ("heads", 5, "heads is 5"),
        ("heads", 6, "qkv_bias"),
        ("intermediate", 0, "intermediate is 0"),
        ("intermediate", 90, "intermediate is 90"),
        ("intermediate", -96, "intermediate is -96"),
        ("intermediate", 112, "panels"),
        ("qkv_bias", case["qkv_bias"][:-1]),
        ("qkv_bias", case["qkv_bias"].double()),
        ("query_norm", torch.ones(8)),
        ("query_norm", torch.ones(16).half()),
        ("key_norm", torch.ones(1, 16)),
        ("key_norm", spread(torch.ones(16))),
    ]


WRONG: list[tuple[str, Row]] = [
    *(("decoder_layer", row) for row in both(DECODER)),
    ("decoder_layer", ("slot_mapping", DECODER["slot_mapping"].int())),
    ("decoder_layer", ("slot_mapping", DECODER["slot_mapping"][:-1])),
    ("decoder_layer", ("slot_mapping", spread(DECODER["slot_mapping"]))),
    ("decoder_layer", ("slot_mapping", DECODER["slot_mapping"].where(DECODER["slot_mapping"] >= 0, SLOTS))),
    ("decoder_layer", ("query_starts", DECODER["query_starts"].long())),
    ("decoder_layer", ("query_starts", DECODER["query_starts"][:-1])),
    ("decoder_layer", ("query_starts", ids(0, 3, 2))),
    ("decoder_layer", ("query_starts", ids(0, 2, 8))),
    ("decoder_layer", ("query_starts", ids(-1, 2, 6))),
    ("decoder_layer", ("query_starts", DECODER["context_lens"][:1])),
    ("decoder_layer", ("context_lens", ids(1, 4))),
    *(("draft_layer", row) for row in both(DRAFT)),
    ("draft_layer", ("context_lens", DRAFT["context_lens"][:1])),
    ("draft_layer", ("places", DRAFT["places"].int())),
    ("draft_layer", ("places", DRAFT["places"][:, :2])),
    ("draft_layer", ("places", spread(DRAFT["places"]))),
    ("draft_layer", ("places", DRAFT["places"] + 1)),
    ("draft_layer", ("visible", DRAFT["visible"].long())),
    ("draft_layer", ("visible", DRAFT["visible"][:1])),
    ("draft_layer", ("visible", spread(DRAFT["visible"]))),
    ("draft_layer", ("visible", DRAFT["visible"] + 1)),
    ("draft_layer", ("visible", DRAFT["visible"] - 2)),
    ("draft_layer", ("block_key", DRAFT["block_key"][0])),
    ("draft_layer", ("block_key", DRAFT["block_key"][:1])),
    ("draft_layer", ("block_key", spread(DRAFT["block_key"]))),
    ("draft_layer", ("block_key", DRAFT["block_key"].half())),
    ("draft_layer", ("block_value", DRAFT["block_value"][:, :2])),
    ("draft_layer", ("block_value", spread(DRAFT["block_value"]))),
    ("draft_layer", ("block_value", DRAFT["block_value"].bfloat16())),
]


@pytest.mark.parametrize(
    ("operator", "name", "value", "message"),
    [(operator, name, value, *(message or (name,))) for operator, (name, value, *message) in WRONG],
)
def test_wrong_arguments_are_named(compiled: ModuleType, operator: str, name: str, value: Any, message: str) -> None:
    case = CASES[operator]
    arguments = case.copied() | {name: value}
    with pytest.raises(RuntimeError, match=message):
        getattr(compiled, operator)(*arguments.values())
    for key in {*case.written} - {name}:
        torch.testing.assert_close(arguments[key], case[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("operator", CASES)
def test_heads_that_are_too_wide_or_odd_are_refused(compiled: ModuleType, operator: str) -> None:
    case = CASES[operator]
    names = {"block_key", "block_value", "key_cache", "value_cache"} & case.arguments.keys()
    refused = {260: "head_dim is 260, expected 1 to 256", 15: "head_dim is 15, expected an even number"}
    for width, message in refused.items():
        arguments = case.copied() | {name: torch.zeros(*case[name].shape[:3], width) for name in names}
        with pytest.raises(RuntimeError, match=message):
            getattr(compiled, operator)(*(arguments | {"qkv_bias": None, "query_norm": None}).values())
