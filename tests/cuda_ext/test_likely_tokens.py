"""The likeliest tokens of rows of logits."""

from types import ModuleType
from typing import Any

import pytest
import torch

from cuda_ext import ops
from tests.cuda_ext.oracle import threads


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("vocab", [1, 5, 16, 33, 1000])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_they_are_those_of_a_full_softmax(operations: ModuleType, vocab: int, rows: int | None) -> None:
    logits = numbers(2, vocab)
    bias = None if rows is None else numbers(2, rows, vocab, seed=1)
    whole = logits[:, None].double() + (0 if bias is None else bias.double())
    for count in {1, min(4, vocab), vocab}:
        probabilities, tokens, log_sums = operations.likely_tokens(logits, bias, count)
        best = whole.softmax(dim=-1).topk(count, dim=-1)
        assert tokens.dtype == torch.int64 and torch.equal(tokens, best.indices)
        torch.testing.assert_close(probabilities.double(), best.values, rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(log_sums.double(), whole.logsumexp(dim=-1), rtol=1e-6, atol=1e-6)


def test_of_equal_tokens_the_first_are_taken_in_order(operations: ModuleType) -> None:
    logits = torch.zeros(1, 50)
    logits[0, [7, 30, 49]] = 1
    assert operations.likely_tokens(logits, None, 5)[1].tolist() == [[[7, 30, 49, 0, 1]]]


def test_excluded_tokens_have_no_probability(operations: ModuleType) -> None:
    logits = torch.full((1, 40), -torch.inf)
    logits[0, 20] = 3
    probabilities, tokens, log_sums = operations.likely_tokens(logits, None, 2)
    assert tokens[0, 0, 0] == 20 and probabilities.tolist() == [[[1, 0]]] and log_sums.tolist() == [[3]]


def test_large_logits_do_not_overflow(operations: ModuleType) -> None:
    logits = torch.tensor([[3e38, 3e38, -3e38]])
    probabilities, tokens, _ = operations.likely_tokens(logits, None, 3)
    assert probabilities.tolist() == [[[0.5, 0.5, 0]]] and tokens[0, 0, :2].tolist() == [0, 1]


@pytest.mark.parametrize("count", [1, 2])
def test_neighbours_and_threads_do_not_matter(compiled: ModuleType, count: int) -> None:
    logits, bias = numbers(9, 700), numbers(9, 2, 700, seed=3)
    whole = compiled.likely_tokens(logits, bias, 20)
    with threads(count):
        for row in range(9):
            part = compiled.likely_tokens(logits[row : row + 1], bias[row : row + 1], 20)
            assert all(torch.equal(one, all_[row : row + 1]) for one, all_ in zip(part, whole, strict=True))


def test_the_operator_keeps_to_its_schema_and_its_fake_kernel() -> None:
    torch.library.opcheck(ops.likely_tokens, (numbers(2, 20), numbers(2, 3, 20), 4))
    torch.library.opcheck(ops.likely_tokens, (numbers(2, 20), None, 4))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("logits", (numbers(20), None, 4)),
        ("logits", (numbers(2, 20).double(), None, 4)),
        ("logits", (numbers(20, 2).T, None, 2)),
        ("bias", (numbers(2, 20), numbers(2, 20), 4)),
        ("bias", (numbers(2, 20), numbers(1, 3, 20), 4)),
        ("bias", (numbers(2, 20), numbers(2, 3, 19), 4)),
        ("bias", (numbers(2, 20), numbers(2, 3, 20).half(), 4)),
        ("count is 21", (numbers(2, 20), None, 21)),
        ("count is 0", (numbers(2, 20), None, 0)),
    ],
)
def test_wrong_arguments_are_named(compiled: ModuleType, name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(RuntimeError, match=name):
        compiled.likely_tokens(*arguments)
