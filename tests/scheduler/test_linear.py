"""The target's linear layers on our kernel, put in vLLM's place; no engine is started."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import vllm.model_executor.layers.utils as layer_utils
from torch import nn

from cuda_ext import ops
from cuda_ext.linear import PackedWeight, WeightFormat, pack
from scheduler import vllm_linear
from scheduler.options import TargetWeights
from scheduler.vllm_linear import PackedCall, packed_linears

PACKED = [weights for weights in TargetWeights if weights is not TargetWeights.VLLM]


class TheirDispatch:
    """Notes what is left to vLLM."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, bool]] = []

    def __call__(self, layer: nn.Module, remove_weight: bool) -> None:
        self.calls.append((layer, remove_weight))


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> TheirDispatch:
    dispatch = TheirDispatch()
    monkeypatch.setattr(layer_utils, "dispatch_cpu_unquantized_gemm", dispatch)
    return dispatch


@pytest.fixture
def compiled() -> None:
    if not ops.kernels().cpu_compiled:
        pytest.skip("compiled kernels are not built")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear(out: int = 50, inputs: int = 64, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, out, bias)
    for parameter in layer.parameters():
        parameter.data = numbers(*parameter.shape)
    return layer


def dispatch(layer: nn.Module, remove_weight: bool = True) -> None:
    """What vLLM does with a layer once its weight is loaded."""
    layer_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=remove_weight)


def apply(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What vLLM does in a forward pass."""
    result: torch.Tensor = layer_utils.cpu_unquantized_gemm(layer, x, layer.weight, getattr(layer, "bias", None))
    return result


def packed_weight(layer: nn.Module) -> PackedWeight:
    call = layer.cpu_linear
    assert isinstance(call, PackedCall)
    return call.packed


@pytest.mark.parametrize("weights", PACKED)
def test_vllms_dispatch_is_replaced_inside_only(compiled: None, theirs: TheirDispatch, weights: TargetWeights) -> None:
    with packed_linears(weights):
        assert layer_utils.dispatch_cpu_unquantized_gemm is not theirs
        dispatch(linear())
    assert layer_utils.dispatch_cpu_unquantized_gemm is theirs
    assert not theirs.calls


def test_vllms_dispatch_is_back_after_a_failure(compiled: None, theirs: TheirDispatch) -> None:
    with pytest.raises(OSError, match="no weights"), packed_linears(TargetWeights.EXACT):
        raise OSError("no weights")
    assert layer_utils.dispatch_cpu_unquantized_gemm is theirs


def test_layers_can_be_left_to_vllm(compiled: None, theirs: TheirDispatch) -> None:
    with packed_linears(TargetWeights.VLLM):
        assert layer_utils.dispatch_cpu_unquantized_gemm is theirs


def test_nothing_is_replaced_without_compiled_kernels(theirs: TheirDispatch, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(ops.kernels(), cpu_compiled=False)
    monkeypatch.setattr(ops, "kernels", lambda: absent)
    with packed_linears(TargetWeights.EXACT):
        assert layer_utils.dispatch_cpu_unquantized_gemm is theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", PACKED)
def test_a_layer_computes_what_it_did(
    compiled: None, theirs: TheirDispatch, weights: TargetWeights, bias: bool
) -> None:
    layer = linear(bias=bias)
    # Of sums of 64 products of numbers of about 1.
    tolerance = {TargetWeights.BFLOAT16: 0.1, TargetWeights.INT8: 0.3}.get(weights, 4e-5)
    cases = [numbers(5, 64), numbers(2, 3, 64), numbers(64), numbers(0, 64), numbers(64, 7).T]
    expected = [F.linear(x, layer.weight, layer.bias).detach() for x in cases]
    before = None if layer.bias is None else layer.bias.detach().clone()
    with packed_linears(weights):
        dispatch(layer)
    for x, wanted in zip(cases, expected, strict=True):
        actual = apply(layer, x)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance)
    assert before is None or torch.equal(layer.bias, before)


@pytest.mark.parametrize(
    ("weights", "format"),
    [
        (TargetWeights.EXACT, WeightFormat.FLOAT16),
        (TargetWeights.FLOAT32, WeightFormat.FLOAT32),
        (TargetWeights.BFLOAT16, WeightFormat.BFLOAT16),
        (TargetWeights.INT8, WeightFormat.INT8),
    ],
)
def test_weights_are_held_as_asked_for(
    compiled: None, theirs: TheirDispatch, weights: TargetWeights, format: WeightFormat
) -> None:
    layer = linear()
    layer.weight.data = layer.weight.data.half().float()
    with packed_linears(weights):
        dispatch(layer)
    assert packed_weight(layer).format is format
    assert torch.equal(packed_weight(layer).panels, pack(linear().weight.half().float(), format).panels)


def test_the_loaded_weight_is_let_go_where_vllm_does_not_need_it(compiled: None, theirs: TheirDispatch) -> None:
    removed, kept = linear(), linear()
    with packed_linears(TargetWeights.EXACT):
        dispatch(removed, remove_weight=True)
        dispatch(kept, remove_weight=False)
    assert removed.weight.numel() == 0 and not removed.weight.requires_grad
    assert torch.equal(kept.weight, linear().weight)


def test_a_weight_of_two_layers_is_packed_once(compiled: None, theirs: TheirDispatch) -> None:
    embedding, head, other = linear(bias=False), linear(bias=False), linear(bias=False)
    head.weight = embedding.weight
    with packed_linears(TargetWeights.EXACT):
        for layer in (embedding, head, other):
            dispatch(layer, remove_weight=False)
    first, second, third = (packed_weight(layer) for layer in (embedding, head, other))
    assert first is second and second is not third


def test_a_freed_weights_address_is_not_taken_for_the_weight(compiled: None, theirs: TheirDispatch) -> None:
    with packed_linears(TargetWeights.FLOAT32):
        for scale in range(1, 5):
            layer = linear(bias=False)
            layer.weight.data = scale * layer.weight.data
            x = numbers(3, 64)
            expected = F.linear(x, layer.weight).detach()
            dispatch(layer, remove_weight=False)
            torch.testing.assert_close(apply(layer, x), expected, rtol=0, atol=1e-4)
            del layer


@pytest.mark.parametrize("remove_weight", [True, False])
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 4, dtype=torch.bfloat16),
        torch.zeros(3, 4, dtype=torch.float16),
        torch.zeros(3, 4, dtype=torch.float64),
        torch.zeros(3, 1, 4),
        torch.zeros(3, 4, device="meta"),
    ],
    ids=["bfloat16", "float16", "float64", "three axes", "not loaded"],
)
def test_other_weights_are_left_to_vllm(
    compiled: None, theirs: TheirDispatch, weight: torch.Tensor, remove_weight: bool
) -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(weight)
    with packed_linears(TargetWeights.EXACT):
        dispatch(layer, remove_weight)
    assert theirs.calls == [(layer, remove_weight)]
    assert not hasattr(layer, "cpu_linear") and layer.weight.shape == weight.shape


def test_a_rows_result_does_not_depend_on_the_batch(compiled: None, theirs: TheirDispatch) -> None:
    layer = linear(300, 96)
    with packed_linears(TargetWeights.EXACT):
        dispatch(layer)
    x = numbers(33, 96)
    whole = apply(layer, x)
    for rows in (1, 2, 5, 8, 16):
        assert torch.equal(apply(layer, x[:rows]), whole[:rows])


def test_what_was_packed_is_logged(compiled: None, theirs: TheirDispatch, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(vllm_linear.logger, "info", lambda text, *values: lines.append(text % values))
    half = linear(1600, 625)
    half.weight.data = half.weight.data.half().float()
    shared = linear(1600, 625)
    with packed_linears(TargetWeights.EXACT):
        dispatch(half)
        dispatch(shared, remove_weight=False)
        dispatch(shared, remove_weight=False)
        dispatch(linear(1600, 625))
    assert lines == ["target weights: 2 as float32, 1 as float16; 10 MB are read for one token"]
