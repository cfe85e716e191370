"""The two forms of a serving layer against each other, and the one-call form against the network for training."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from cuda_ext import ops
from drafter.config import DrafterConfig
from drafter.layers import BlockContext, BlockRows, ServingLayer, _ModularLayer, _OneCallLayer, serving_layer
from drafter.model import DrafterLayer, RotaryEmbedding
from drafter.serving import ServingDrafter
from drafter.types import PagedCacheSpec
from tests.drafter.dense import dense_block
from tests.drafter.tiny import INNER, dflash_config, random_drafter, random_target, shift_config

compiled = pytest.mark.skipif(not ops.kernels().cpu_compiled, reason="compiled kernels are not built")

# The one-call form wants an inner width of whole panels.
CONFIGS = {
    "plain": shift_config(intermediate_size=32),
    "norms of heads": dflash_config(intermediate_size=48),
    "one key head": shift_config(intermediate_size=16, num_kv_heads=1, head_dim=6, hidden_size=20),
}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
PAGE_SIZE, PAGES, SLOTS = 4, 3, 5
LENGTHS = (5, 0, 11)
EPS = 1e-5


def random_layer(config: DrafterConfig) -> DrafterLayer:
    layer = random_drafter(config).model.layers[1]
    assert isinstance(layer, DrafterLayer)
    return layer


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Served:
    """A layer with its pages and the blocks of three requests, all of which start out as NaN."""

    def __init__(self, layer: ServingLayer, config: DrafterConfig):
        kv = config.num_kv_heads, config.head_dim
        self._layer, self._rotary = layer, RotaryEmbedding(config.head_dim, config.rope_theta)
        self.pages = torch.full((len(LENGTHS) * PAGES, 2, PAGE_SIZE, *kv), torch.nan)
        self.block = torch.full((2, len(LENGTHS), SLOTS, *kv), torch.nan)
        tables = torch.randperm(len(self.pages), generator=torch.Generator().manual_seed(1)).int()
        self._context = BlockContext(tables.view(len(LENGTHS), PAGES), torch.tensor(LENGTHS, dtype=torch.int32))

    def write_context(self, features: torch.Tensor) -> None:
        """Store ``features`` ``[tokens, hidden]``, the requests' one behind the other, and a row of padding."""
        starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
        positions, slots = [], []
        for table, (first, last) in zip(self._context.block_tables, pairwise(starts), strict=True):
            tokens = torch.arange(last - first)
            positions.append(tokens)
            slots.append(table[tokens // PAGE_SIZE].long() * PAGE_SIZE + tokens % PAGE_SIZE)
        at, where = torch.cat([*positions, torch.tensor([2])]), torch.cat([*slots, torch.tensor([-1])])
        self._layer.write_context(features, self._rotary.covering(at), at, where, self.pages)

    def run(
        self, x: torch.Tensor, residual: torch.Tensor | None, places: list[list[int]], visible: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the rows that go to ``places``; each stands at the position of the place, counted from the context."""
        at = torch.tensor(places)
        positions = torch.tensor(LENGTHS)[:, None] + at.clamp(min=0)
        rows = BlockRows(positions, at, torch.tensor(visible, dtype=torch.int32))
        table, block = self._rotary.covering(positions), (self.block[0], self.block[1])
        return self._layer.run(x, residual, table, rows, self._context, self.pages, block)


# A first pass over whole blocks, in any order, and a second one over what is left of them.
PASSES = [
    ([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4]], [[1, 2, 3, 4, 5], [5, 5, 5, 5, 5], [1, 2, 3, 4, 5]]),
    ([[3, 4], [2, -1], [-1, -1]], [[4, 5], [5, 1], [0, 0]]),
]


@compiled
@EVERY_CONFIG
@pytest.mark.parametrize("first_layer", [True, False])
@torch.inference_mode()
def test_both_forms_compute_the_same(config: DrafterConfig, first_layer: bool) -> None:
    layer = random_layer(config)
    one, other = (Served(form(layer, EPS), config) for form in (_OneCallLayer, _ModularLayer))
    features = numbers(sum(LENGTHS) + 1, config.hidden_size)
    for served in (one, other):
        served.write_context(features)
    assert torch.equal(one.pages.isnan(), other.pages.isnan()) and not one.pages.isnan().all()
    for number, (places, visible) in enumerate(PASSES):
        shape = (len(LENGTHS), len(places[0]), config.hidden_size)
        x, residual = numbers(*shape, seed=number), None if first_layer else numbers(*shape, seed=9 + number)
        before = one.pages.clone()
        for mine, theirs in zip(
            one.run(x, residual, places, visible), other.run(x, residual, places, visible), strict=True
        ):
            assert mine.shape == shape and not mine.isnan().any()
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.block, other.block, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.pages, before, rtol=0, atol=0, equal_nan=True)


@compiled
@pytest.mark.parametrize("config", [shift_config(intermediate_size=32), dflash_config(intermediate_size=32)])
@torch.inference_mode()
def test_the_one_call_form_is_the_network_that_is_trained(config: DrafterConfig) -> None:
    drafter, target = random_drafter(config), random_target()
    serving = ServingDrafter(random_drafter(config), target, PagedCacheSpec(PAGES, PAGE_SIZE))
    assert all(isinstance(layer, _OneCallLayer) for layer in serving._layers)
    context, slots = 11, config.block_size
    features = serving.context_features(numbers(context, config.feature_size))
    serving.write_context(features, torch.arange(context), torch.arange(context))
    tokens, order = torch.tensor([[7, 3, 12, 3]]), [0, 2, 1, 3]
    inputs = serving.block_inputs(tokens[:, order], torch.tensor([order]), features[-1:])
    visible = torch.arange(1, slots + 1) if config.causal else torch.full((slots,), slots)
    rows = BlockRows(context + torch.tensor([order]), torch.arange(slots)[None], visible[None].int())
    where = BlockContext(torch.arange(PAGES, dtype=torch.int32)[None], torch.tensor([context], dtype=torch.int32))
    hidden = serving.run(inputs, rows, where, serving.block_cache(1, slots))[0]
    by_slot = hidden[torch.tensor(order).argsort()]
    predicting = dense_block(drafter.model, features, tokens[0].tolist(), order, target.embedding)
    torch.testing.assert_close(by_slot[slots - len(predicting) :], predicting, rtol=1e-5, atol=1e-5)


@compiled
def test_layers_that_the_kernel_serves_run_in_one_call() -> None:
    assert isinstance(serving_layer(random_layer(CONFIGS["plain"]), EPS), _OneCallLayer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_layers_of_other_types_run_operator_by_operator(dtype: torch.dtype) -> None:
    assert isinstance(serving_layer(random_layer(CONFIGS["plain"]).to(dtype), EPS), _ModularLayer)


def test_layers_of_another_width_run_operator_by_operator() -> None:
    assert INNER % 16
    assert isinstance(serving_layer(random_layer(shift_config()), EPS), _ModularLayer)


def test_without_compiled_kernels_layers_run_operator_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(ops.kernels(), cpu_compiled=False)
    monkeypatch.setattr(ops, "kernels", lambda: absent)
    assert isinstance(serving_layer(random_layer(CONFIGS["plain"]), EPS), _ModularLayer)
