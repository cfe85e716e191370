"""A block that is refined pass by pass is, to the bit, the block computed at once in its final order."""

from collections.abc import Callable
from types import ModuleType

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cuda_ext.layers import LayerShape, angles
from tests.cuda_ext.oracle import rotary_table

SHAPE = LayerShape(heads=3, kv_heads=1, head_dim=64, head_norms=True)


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Refinement:
    """One decoder layer over blocks whose slots are observed in different passes.

    Args:
        observed_at: the pass from which each slot's token is known; 9 for one that stays masked.
        context_lens: tokens before each block.
    """

    def __init__(self, operations: ModuleType, observed_at: list[list[int]], context_lens: list[int], seed: int):
        self._operations, self._observed_at = operations, torch.tensor(observed_at, dtype=torch.int32)
        self._requests, self._slots = self._observed_at.shape
        shape = (self._requests, self._slots, SHAPE.hidden)
        self._known, self._masked = (numbers(*shape, seed=seed + i) for i in range(2))
        pages = numbers(16, 2, 16, 1, SHAPE.head_dim, seed=seed)
        self._caches = pages[:, 0], pages[:, 1]
        self._tables = torch.arange(16, dtype=torch.int32).view(1, 16).repeat(self._requests, 1)
        self._lengths = torch.tensor(context_lens, dtype=torch.int32)
        self._table = rotary_table(angles(SHAPE.head_dim))
        self._block_shape = (2, self._requests, self._slots, 1, SHAPE.head_dim)

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything at once, in the final order: the rows by logical slot, and the block."""
        block = torch.full(self._block_shape, torch.nan)
        rows = self._computed(10, block, [0] * self._requests)
        return torch.stack([torch.stack([row[slot] for slot in range(self._slots)]) for row in rows]), block

    def pass_by_pass(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with only those slots computed in each pass that the passes before it could not finish."""
        block = torch.full(self._block_shape, torch.nan)
        latest: list[dict[int, torch.Tensor]] = [{} for _ in range(self._requests)]
        for number in range(int(self._observed_at.where(self._observed_at < 9, 0).max()) + 1):
            finished = (self._observed_at < number).sum(dim=1).tolist()
            for row, computed in zip(latest, self._computed(number, block, finished), strict=True):
                row.update(computed)
        return torch.stack([torch.stack([row[slot] for slot in range(self._slots)]) for row in latest]), block

    def _computed(self, number: int, block: torch.Tensor, finished: list[int]) -> list[dict[int, torch.Tensor]]:
        """Compute the slots behind the ``finished`` first places with what is observed in pass ``number``."""
        observed = self._observed_at <= number
        known = observed & (self._observed_at < 9)
        order, _, positions, visible = self._operations.partition_block(
            self._observed_at.where(observed, 9), self._lengths.long()
        )
        fewest, places = min(finished), torch.arange(self._slots).repeat(self._requests, 1)
        places = places.where(places >= torch.tensor(finished)[:, None], -1)[:, fewest:]
        inputs = torch.where(known[..., None], self._known, self._masked)
        order, positions, visible = (part[:, fewest:].contiguous() for part in (order, positions, visible))
        output, stream = self._operations.draft_layer(
            inputs.gather(1, order[..., None].expand(-1, -1, SHAPE.hidden)),
            None,
            positions,
            places.contiguous(),
            visible,
            *block,
            *self._caches,
            self._tables,
            self._lengths,
            self._table,
            SHAPE.scale,
            *SHAPE.weights.arguments,
        )
        results = torch.cat([output, stream], dim=2)
        pairs = zip(order.tolist(), places.tolist(), results, strict=True)
        return [
            {slot: row for slot, place, row in zip(slots, at, rows, strict=True) if place >= 0}
            for slots, at, rows in pairs
        ]


@st.composite
def refinements(draw: st.DrawFn) -> Callable[[ModuleType], Refinement]:
    requests, slots = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    passes = st.tuples(st.just(0), *[st.sampled_from([0, 1, 2, 3, 9])] * (slots - 1)).map(list)
    observed_at = draw(st.lists(passes, min_size=requests, max_size=requests))
    lengths = draw(st.lists(st.integers(0, 40), min_size=requests, max_size=requests))
    seed = draw(st.integers(0, 1000))
    return lambda operations: Refinement(operations, observed_at, lengths, seed)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(make=refinements())
def test_refining_is_the_same_as_computing_the_final_block_at_once(
    operations: ModuleType, make: Callable[[ModuleType], Refinement]
) -> None:
    refinement = make(operations)
    bound = 32 * torch.finfo(torch.float32).eps
    for at_once, refined in zip(refinement.whole(), refinement.pass_by_pass(), strict=True):
        assert not at_once.isnan().any()
        torch.testing.assert_close(refined, at_once, rtol=bound, atol=bound)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(make=refinements())
def test_refining_changes_no_bit(compiled: ModuleType, make: Callable[[ModuleType], Refinement]) -> None:
    refinement = make(compiled)
    for at_once, refined in zip(refinement.whole(), refinement.pass_by_pass(), strict=True):
        assert torch.equal(refined, at_once)
