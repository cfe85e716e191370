"""The drafter's packed linear layers on each of their three ways: our kernel, oneDNN, and PyTorch's own product."""

from collections.abc import Callable
from dataclasses import replace

import gguf
import pytest
import torch
import torch.nn.functional as F

from cuda_ext import ops
from cuda_ext.linear import WeightFormat, pack
from drafter.model import MarkovHead
from drafter.packed import PackedLinear, PackedMarkovHead

SHAPES = [(64,), (5, 64), (2, 3, 64), (0, 64), (2, 0, 64)]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def half_numbers(*shape: int) -> torch.Tensor:
    return numbers(*shape).half().float()


class CalledError(Exception):
    pass


def refuse(*_: object, **__: object) -> None:
    raise CalledError


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(ops.kernels(), cpu_compiled=False)
    monkeypatch.setattr(ops, "kernels", lambda: absent)


def on_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ops.kernels().cpu_compiled:
        pytest.skip("compiled kernels are not built")
    monkeypatch.setattr(F, "linear", refuse)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse)


def on_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    without_kernels(monkeypatch)
    monkeypatch.setattr(F, "linear", refuse)
    monkeypatch.setattr(ops, "linear", refuse)


def on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(ops, "linear", refuse)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse)


Way = Callable[[pytest.MonkeyPatch], None]
WAYS: list[Way] = [on_our_kernel, on_onednn, on_torch]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_is_the_product(way: Way, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = numbers(50, 64), numbers(*shape)
    expected = F.linear(x, weight)
    way(monkeypatch)
    actual = PackedLinear(weight)(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=4e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("x", [numbers(64, 3).T, numbers(64, 3, 2).permute(2, 1, 0)], ids=["columns", "axes"])
def test_inputs_need_not_be_contiguous(way: Way, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numbers(50, 64)
    expected = F.linear(x, weight)
    way(monkeypatch)
    torch.testing.assert_close(PackedLinear(weight)(x), expected, rtol=0, atol=4e-5)


@pytest.mark.parametrize("way", [on_our_kernel, on_onednn])
def test_the_weight_is_held_once(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    way(monkeypatch)
    layer = PackedLinear(numbers(50, 64))
    assert layer._weight.numel() == 0
    assert not list(layer.parameters())


def test_the_ways_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above forbid is what the ways would call."""
    x = numbers(3, 64)
    for way, name in ((on_our_kernel, "linear"), (on_onednn, "_linear_pointwise"), (on_torch, "linear")):
        with monkeypatch.context() as patch:
            way(patch)
            layer = PackedLinear(numbers(50, 64))
            owner = {on_our_kernel: ops, on_onednn: torch.ops.mkldnn, on_torch: F}[way]
            patch.setattr(owner, name, refuse)
            with pytest.raises(CalledError):
                layer(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    weight, x = numbers(50, 64).to(dtype), numbers(3, 64).to(dtype)
    result = PackedLinear(weight)(x)
    assert result.dtype == dtype and torch.equal(result, F.linear(x, weight))


@pytest.mark.parametrize(
    ("make", "lossy", "format"),
    [
        (numbers, False, WeightFormat.FLOAT32),
        (numbers, True, WeightFormat.FLOAT16),
        (half_numbers, False, WeightFormat.FLOAT16),
        (half_numbers, True, WeightFormat.FLOAT16),
        (lambda *shape: (1e6 * numbers(*shape)).bfloat16().float(), True, WeightFormat.BFLOAT16),
    ],
    ids=["float32", "rounded", "float16", "float16, may be rounded", "bfloat16, may be rounded"],
)
def test_our_kernel_gets_the_smallest_format_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, make: Callable[..., torch.Tensor], lossy: bool, format: WeightFormat
) -> None:
    on_our_kernel(monkeypatch)
    weight = make(50, 64)
    packed = PackedLinear(weight, lossy=lossy)._packed
    assert packed is not None and packed.format is format
    assert torch.equal(packed.panels, pack(weight, format).panels)


def test_rounding_is_not_what_blocks_get(monkeypatch: pytest.MonkeyPatch) -> None:
    on_our_kernel(monkeypatch)
    kind = gguf.GGMLQuantizationType.Q8_0
    weight = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(numbers(50, 64).numpy(), kind), kind))
    packed = PackedLinear(weight, lossy=True)._packed
    assert packed is not None and packed.format is WeightFormat.Q8_0


def test_a_row_is_the_same_in_every_batch_on_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    on_our_kernel(monkeypatch)
    layer, x = PackedLinear(numbers(300, 64)), numbers(20, 64)
    whole = layer(x)
    for rows in range(1, 20):
        assert torch.equal(layer(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize("way", WAYS)
def test_the_markov_head_is_what_was_trained(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    head = MarkovHead(vocab_size=40, draft_vocab_size=30, rank=8)
    head.logits.weight.data = numbers(*head.logits.weight.shape)
    head.previous.weight.data = numbers(*head.previous.weight.shape)
    previous = torch.tensor([[3, 0], [39, 3]])
    expected = head(previous).detach()
    way(monkeypatch)
    actual = PackedMarkovHead(head)(previous)
    assert actual.shape == (2, 2, 30) and not actual.requires_grad
    torch.testing.assert_close(actual, expected, rtol=0, atol=4e-5)
