import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext.reference import block_attention, write_pages

SCALE = 0.37
HEAD_DIM = 4


class Case:
    """Random inputs of ``block_attention``; rows of pages that belong to nobody hold NaN and infinities."""

    def __init__(
        self,
        context_lens: list[int],
        visible: list[list[int]],
        heads: int = 4,
        kv_heads: int = 2,
        page_size: int = 3,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        requests, block = len(visible), len(visible[0])
        self.kv_heads, self.page_size = kv_heads, page_size
        self.query = torch.randn(requests, block, heads, HEAD_DIM, generator=generator)
        self.block_key = torch.randn(requests, block, kv_heads, HEAD_DIM, generator=generator)
        self.block_value = torch.randn(requests, block, kv_heads, HEAD_DIM, generator=generator)
        per_request = max(1, -(-max(context_lens) // page_size))
        num_pages = requests * per_request + 2
        self.pages = torch.full((num_pages, 2, page_size, kv_heads, HEAD_DIM), math.nan)
        self.pages[:, :, ::2] = math.inf
        self.block_table = torch.randperm(num_pages, generator=generator)[: requests * per_request].int()
        self.block_table = self.block_table.view(requests, per_request)
        self.context_lens = torch.tensor(context_lens)
        self.visible = torch.tensor(visible)
        for r, length in enumerate(context_lens):
            for token in range(length):
                row = torch.randn(2, kv_heads, HEAD_DIM, generator=generator)
                self.pages[self.block_table[r, token // page_size], :, token % page_size] = row

    def actual(self) -> torch.Tensor:
        return block_attention(
            self.query,
            self.block_key,
            self.block_value,
            self.pages,
            self.block_table,
            self.context_lens,
            self.visible,
            SCALE,
        )

    def expected(self) -> torch.Tensor:
        requests, block, heads, _ = self.query.shape
        output = torch.empty_like(self.query)
        for r in range(requests):
            for slot in range(block):
                for head in range(heads):
                    output[r, slot, head] = self._one(r, slot, head)
        return output

    def _one(self, r: int, slot: int, head: int) -> torch.Tensor:
        group = head // (self.query.shape[2] // self.kv_heads)
        rows = []
        for token in range(int(self.context_lens[r])):
            page = int(self.block_table[r, token // self.page_size])
            rows.append(self.pages[page, :, token % self.page_size, group])
        for other in range(int(self.visible[r, slot])):
            rows.append(torch.stack([self.block_key[r, other, group], self.block_value[r, other, group]]))
        scores = torch.stack([SCALE * (self.query[r, slot, head] * key).sum() for key, _ in rows])
        weights = (scores - scores.max()).exp()
        values = torch.stack([value for _, value in rows])
        return (weights[:, None] * values).sum(0) / weights.sum()


def causal(block: int) -> list[int]:
    return list(range(1, block + 1))


def check(case: Case) -> None:
    torch.testing.assert_close(case.actual(), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context_lens", [[1], [2], [3], [4], [6], [7], [3, 0, 7], [0, 1], [6, 5, 4, 3, 2, 1, 0]])
def test_ragged_contexts(context_lens: list[int]) -> None:
    check(Case(context_lens, [causal(4)] * len(context_lens)))


@pytest.mark.parametrize("context_lens", [[0], [0, 0]])
def test_no_context_at_all(context_lens: list[int]) -> None:
    check(Case(context_lens, [causal(4)] * len(context_lens)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (6, 1), (6, 2)])
def test_query_heads_share_key_heads(heads: int, kv_heads: int) -> None:
    check(Case([5, 2], [causal(3)] * 2, heads, kv_heads))


@pytest.mark.parametrize(
    "visible",
    [
        [[1], [1]],
        [[1, 2, 3], [1, 2, 3]],
        [[3, 3, 3], [3, 3, 3]],
        [[1, 2, 3], [3, 3, 3]],
        [[2, 2, 3], [1, 3, 2]],
        [[1, 1, 1], [2, 1, 1]],
    ],
    ids=["one slot", "causal", "bidirectional", "mixed", "any", "slots that nobody sees"],
)
def test_visible_slots(visible: list[list[int]]) -> None:
    check(Case([4, 7], visible))


def test_slots_beyond_the_visible_ones_change_nothing() -> None:
    case = Case([5], [[1, 2, 2, 2]])
    before = case.actual()
    case.block_key[:, 2:] = math.nan
    case.block_value[:, 2:] = math.inf
    torch.testing.assert_close(case.actual(), before, rtol=0, atol=0)


def test_requests_may_share_pages() -> None:
    case = Case([6, 5], [causal(3)] * 2)
    case.block_table[1] = case.block_table[0]
    check(case)


def test_page_ids_behind_the_context_are_not_followed() -> None:
    case = Case([7, 2], [causal(3)] * 2)
    before = case.actual()
    case.block_table[1, 1:] = case.block_table[0, 2]
    torch.testing.assert_close(case.actual(), before, rtol=0, atol=0)


def test_the_inputs_stay_as_they_are() -> None:
    case = Case([4, 1], [causal(3)] * 2)
    tensors = (case.query, case.block_key, case.block_value, case.pages, case.block_table)
    before = [tensor.clone() for tensor in tensors]
    case.actual()
    for tensor, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    requests, block = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return Case(
        draw(st.lists(st.integers(0, 9), min_size=requests, max_size=requests)),
        [draw(st.lists(st.integers(1, block), min_size=block, max_size=block)) for _ in range(requests)],
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        page_size=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=40, deadline=None)
@given(cases())
def test_any_case(case: Case) -> None:
    check(case)


def rows(count: int, kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    key = torch.arange(1.0, count * kv_heads * HEAD_DIM + 1).view(count, kv_heads, HEAD_DIM)
    return key, -key


def written(num_pages: int, page_size: int, slots: list[int]) -> torch.Tensor:
    pages = torch.zeros(num_pages, 2, page_size, 2, HEAD_DIM)
    key, value = rows(len(slots))
    write_pages(pages, key, value, torch.tensor(slots, dtype=torch.int64))
    return pages


def test_rows_are_written_across_page_boundaries() -> None:
    slots = [10, 11, 3, 4, 5, 0]
    pages = written(4, 3, slots)
    key, value = rows(len(slots))
    expected = torch.zeros_like(pages)
    for i, slot in enumerate(slots):
        expected[slot // 3, 0, slot % 3] = key[i]
        expected[slot // 3, 1, slot % 3] = value[i]
    assert torch.equal(pages, expected)


def test_negative_slots_are_skipped() -> None:
    pages = written(2, 2, [-1, 3, -5, 0])
    key, value = rows(4)
    assert torch.equal(pages[1, 0, 1], key[1]) and torch.equal(pages[1, 1, 1], value[1])
    assert torch.equal(pages[0, 0, 0], key[3]) and torch.equal(pages[0, 1, 0], value[3])
    assert pages.count_nonzero() == 2 * 2 * 2 * HEAD_DIM


def test_only_negative_slots_write_nothing() -> None:
    assert written(2, 2, [-1, -1]).count_nonzero() == 0


def test_no_rows_write_nothing() -> None:
    assert written(2, 2, []).count_nonzero() == 0


def test_other_rows_of_a_page_are_kept() -> None:
    pages = torch.full((1, 2, 3, 2, HEAD_DIM), 7.0)
    key, value = rows(1)
    write_pages(pages, key, value, torch.tensor([1]))
    assert torch.equal(pages[0, :, 1], torch.stack([key[0], value[0]]))
    assert bool((pages[0, :, [0, 2]] == 7.0).all())


def test_what_was_written_is_attended_to() -> None:
    case = Case([5], [causal(2)])
    key, value = rows(5)
    slots = [int(case.block_table[0, t // case.page_size]) * case.page_size + t % case.page_size for t in range(5)]
    write_pages(case.pages, key, value, torch.tensor(slots))
    check(case)
