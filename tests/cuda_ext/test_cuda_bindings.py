"""The binding of the CUDA kernels, as it is, on a torch without CUDA: CPU tensors pass for CUDA ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from cuda_ext import reference
from tests.cuda_ext.host_shim.binding_process import call_all
from tests.cuda_ext.host_shim.builds import binding_command, require_compiler, run_compiler
from tests.cuda_ext.oracle import Case, Recipe, causal

_RECIPE = Recipe((5, 300), (causal(3),) * 2, 3, head_dim=64, page_size=16, interleaved=True, fused=True)
GOOD = replace(_RECIPE, dtype=torch.bfloat16).make()
ONE = GOOD.requests(0)
ODD = (1, *ONE.query.stride()[1:])


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with gaps between them."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers one element behind the start of an allocation."""
    return torch.cat([torch.zeros(1, dtype=tensor.dtype), tensor.flatten()])[1:].view(tensor.shape)


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with one element between rows."""
    return torch.nn.functional.pad(tensor, (0, 1))[..., : tensor.shape[-1]]


FIVE_HEADS = torch.zeros(2, 3, 5, 64, dtype=torch.bfloat16)
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("dimensions", {"query": GOOD.query[0]}, "query has 3 dimensions, expected 4"),
    (
        "heads",
        {"query": FIVE_HEADS},
        "query has 5 heads, expected a multiple of the 2 of block_key",
    ),
    ("type", {"query": GOOD.query.double()}, "query has dtype Double, expected Float, BFloat16 or Half"),
    ("query with gaps", {"query": spread(GOOD.query)}, "query has stride 2 in its last dimension, expected 1"),
    ("head_dim", {"query": GOOD.query[..., :62]}, "head_dim is 62, expected one of 64"),
    ("requests", {"block_key": GOOD.block_key[:1]}, "block_key has shape [1, 3, 2, 64], expected [2, 3, 2, 64]"),
    ("slots", {"block_value": GOOD.block_value[:, :2]}, "block_value has shape [2, 2, 2, 64], expected [2, 3, 2, 64]"),
    ("key type", {"block_key": GOOD.block_key.half()}, "block_key has dtype Half, expected BFloat16 as query"),
    ("value type", {"value_cache": GOOD.value_cache.float()}, "value_cache has dtype Float, expected BFloat16"),
    ("page size", {"value_cache": GOOD.value_cache[:, :2]}, "value_cache has shape"),
    ("kv heads", {"key_cache": GOOD.key_cache[:, :, :1]}, "key_cache has shape"),
    ("empty pages", {"key_cache": GOOD.key_cache[:, :0]}, "key_cache has pages of 0 tokens, expected at least 1"),
    ("alignment", {"block_key": shifted(GOOD.block_key)}, "block_key starts 2 bytes behind a multiple of 16"),
    (
        "row alignment",
        {"key_cache": padded(GOOD.key_cache)},
        "key_cache has stride 130 in dimension 1, expected",
    ),
    ("table type", {"block_tables": GOOD.block_tables.long()}, "block_tables has dtype Long, expected Int"),
    ("table dimensions", {"block_tables": GOOD.block_tables[0]}, "block_tables has 1 dimensions, expected 2"),
    ("table requests", {"block_tables": GOOD.block_tables[:1]}, "block_tables has shape"),
    ("table with gaps", {"block_tables": spread(GOOD.block_tables)}, "block_tables has strides"),
    ("length type", {"context_lens": GOOD.context_lens.long()}, "context_lens has dtype Long, expected Int"),
    ("length requests", {"context_lens": GOOD.context_lens[:1]}, "context_lens has shape [1], expected [2]"),
    ("visible type", {"visible": GOOD.visible.long()}, "visible has dtype Long, expected Int"),
    ("visible queries", {"visible": GOOD.visible[:, :2]}, "visible has shape [2, 2], expected [2, 3]"),
    ("device", vars(_RECIPE.make()), "block_attention could not be started: invalid argument"),
]
RIGHT: dict[str, Case] = {
    "views": GOOD,
    "one request, whose stride is nobody's": replace(ONE, query=ONE.query.as_strided(ONE.query.shape, ODD)),
    "no requests": GOOD.requests(),
    "no queries": GOOD.queries(),
    "no pages": replace(
        GOOD,
        context_lens=torch.zeros(2, dtype=torch.int32),
        block_tables=torch.zeros(2, 0, dtype=torch.int32),
        key_cache=GOOD.key_cache[:0],
        value_cache=GOOD.value_cache[:0],
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor | str]:
    require_compiler()
    library = tmp_path_factory.mktemp("cuda_binding") / "binding.so"
    run_compiler(binding_command(library))
    cases = {name: replace(GOOD, **arguments) for name, arguments, _ in WRONG}
    cases |= RIGHT
    return dict(zip(cases, call_all(library, [case.arguments for case in cases.values()]), strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_the_definition(results: dict[str, torch.Tensor | str], name: str) -> None:
    actual = results[name]
    assert isinstance(actual, torch.Tensor), actual
    expected = reference.block_attention(*RIGHT[name].arguments)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(("name", "message"), [(name, message) for name, _, message in WRONG])
def test_wrong_arguments_are_named(results: dict[str, torch.Tensor | str], name: str, message: str) -> None:
    actual = results[name]
    assert isinstance(actual, str) and message in actual
