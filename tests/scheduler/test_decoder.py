"""The target's decoder layers on the operator that runs them in one call; no engine is started.

Layers here are vLLM's classes with what the binding looks at put into them by hand: building them as vLLM does takes a
process group and a model.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models import gemma, llama, qwen2, qwen3
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from cuda_ext import ops, reference
from cuda_ext.linear import WeightFormat
from scheduler import vllm_decoder
from scheduler.vllm_decoder import FusedDecoderLayer, fuse_decoder_layers
from scheduler.vllm_linear import PackedCall
from tests.cuda_ext.layers import EPS, POSITIONS, Case, DecoderRecipe, LayerShape, Outcome, run
from tests.cuda_ext.weights import make

pytestmark = pytest.mark.skipif(not ops.kernels().cpu_compiled, reason="compiled kernels are not built")

PLAIN, BIASED, NORMED = LayerShape(), LayerShape(qkv_bias=True), LayerShape(head_norms=True)
CONFIG: Any = SimpleNamespace(kv_transfer_config=None)
# Of the architectures that are fused: layer, attention and network.
Classes = tuple[type[nn.Module], type[nn.Module], type[nn.Module]]
LLAMA: Classes = (llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP)
QWEN2: Classes = (qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2MLP)
QWEN3: Classes = (qwen3.Qwen3DecoderLayer, qwen3.Qwen3Attention, qwen2.Qwen2MLP)


@pytest.fixture(scope="module", autouse=True)
def vllm_config() -> Iterator[None]:
    """vLLM's modules ask for one while they are built."""
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        yield


def bare(cls: type[nn.Module], **attributes: Any) -> Any:
    """A module with nothing but these attributes."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def linear(packed: Any, bias: torch.Tensor | None = None) -> Any:
    return bare(nn.Module, cpu_linear=PackedCall(packed), bias=None if bias is None else nn.Parameter(bias), tp_size=1)


def norm(weight: torch.Tensor) -> RMSNorm:
    module = RMSNorm(len(weight), EPS)
    module.weight.data = weight
    return module


def rotary(head_dim: int, positions: int = POSITIONS) -> RotaryEmbedding:
    return RotaryEmbedding(head_dim, head_dim, positions, 1000.0, True, torch.float32)


def decoder_layer(shape: LayerShape = PLAIN, classes: Classes = LLAMA, name: str = "layers.0", **parts: Any) -> Any:
    """A layer with the weights of ``shape``; ``parts`` of its attention replace what it has otherwise."""
    weights, (layer, attention, network) = shape.weights, classes
    impl = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)
    vars(impl).update(scale=shape.scale, sliding_window=-1, logits_soft_cap=0, alibi_slopes=None, sinks=None)
    inner = SimpleNamespace(
        layer_name=name,
        impl=impl,
        attn_type=AttentionType.DECODER,
        kv_sharing_target_layer_name=None,
        kv_cache_torch_dtype=torch.float32,
        kv_cache=torch.empty(0),
    )
    given: dict[str, Any] = {
        "qkv_proj": linear(weights.qkv, weights.qkv_bias),
        "o_proj": linear(weights.output),
        "rotary_emb": rotary(shape.head_dim),
        "attn": inner,
        "num_heads": shape.heads,
    }
    if weights.query_norm is not None and weights.key_norm is not None:
        given |= {"q_norm": norm(weights.query_norm), "k_norm": norm(weights.key_norm)}
    return bare(
        layer,
        input_layernorm=norm(weights.input_norm),
        post_attention_layernorm=norm(weights.post_norm),
        self_attn=bare(attention, **(given | parts)),
        mlp=bare(network, gate_up_proj=linear(weights.gate_up), down_proj=linear(weights.down), act_fn=SiluAndMul()),
    )


def fuse(*layers: Any, config: Any = CONFIG) -> int:
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    model.norm = nn.LayerNorm(4)
    return fuse_decoder_layers(model, config)


def is_fused(layer: Any) -> bool:
    return isinstance(layer.forward, FusedDecoderLayer)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(vllm_decoder.logger, "info", lambda text, *values: lines.append(text % values))
    return lines


# What is fused


@pytest.mark.parametrize(
    ("shape", "classes"),
    [(PLAIN, LLAMA), (BIASED, LLAMA), (BIASED, QWEN2), (NORMED, QWEN3)],
    ids=["llama", "llama with biases", "qwen2", "qwen3"],
)
def test_layers_that_the_operator_computes_are_fused(shape: LayerShape, classes: Classes, log: list[str]) -> None:
    layers = [decoder_layer(shape, classes) for _ in range(3)]
    assert fuse(*layers) == 3
    assert all(is_fused(layer) for layer in layers)
    assert log == ["target layers: 3, each in one call"]


def otherwise(cls: type, *methods: str) -> type:
    """A class of the same objects, with these methods of its own."""
    return type(f"Other{cls.__name__}", (cls,), {name: lambda *_: None for name in methods})


def change(path: str, value: Any) -> Callable[[Any], None]:
    """Set an attribute of a layer; ``value`` may be a function of nothing that makes it."""

    def apply(layer: Any) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            layer = getattr(layer, owner)
        setattr(layer, name, value() if callable(value) else value)

    return apply


def of_class(path: str, cls: type) -> Callable[[Any], None]:
    """Give the layer, or a part of it, another class."""

    def apply(layer: Any) -> None:
        for name in path.split(".") if path else ():
            layer = getattr(layer, name)
        layer.__class__ = cls

    return apply


BIAS = partial(nn.Parameter, torch.zeros(64))
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
REFUSED: list[tuple[str, Callable[[Any], None]]] = [
    ("known form", of_class("", otherwise(llama.LlamaDecoderLayer))),
    ("known form", of_class("", gemma.GemmaDecoderLayer)),
    ("known attention", of_class("self_attn", otherwise(llama.LlamaAttention, "forward"))),
    ("known network", of_class("mlp", otherwise(llama.LlamaMLP, "forward"))),
    ("known network", change("mlp.act_fn", GeluAndMul)),
    *(("packed weights", change(f"{name}.cpu_linear", None)) for name in LINEARS),
    *(("undivided weights", change(f"{name}.tp_size", 2)) for name in LINEARS),
    *(("plain projections", change(f"{name}.bias", BIAS)) for name in LINEARS[1:]),
    (
        "inner width of whole panels of 16",
        change("mlp.down_proj.cpu_linear", lambda: PackedCall(make(WeightFormat.FLOAT32, 64, 24))),
    ),
    *(("plain norms", of_class(name, GemmaRMSNorm)) for name in NORMS),
    *(("plain norms", change(f"{name}.variance_size_override", 8)) for name in NORMS),
    *(("one epsilon", change(f"{name}.variance_epsilon", 1e-6)) for name in NORMS),
    ("rotary embedding", change("self_attn.rotary_emb", nn.Identity)),
    ("plain rotation", of_class("self_attn.rotary_emb", otherwise(RotaryEmbedding, "forward_native"))),
    ("plain rotation", of_class("self_attn.rotary_emb", otherwise(RotaryEmbedding, "forward_cpu"))),
    ("rotation of whole heads", change("self_attn.rotary_emb.is_neox_style", False)),
    ("rotation of whole heads", change("self_attn.rotary_emb.rotary_dim", 8)),
    ("paged attention", change("self_attn.attn.impl", SimpleNamespace)),
    ("causal attention", change("self_attn.attn.attn_type", AttentionType.ENCODER_ONLY)),
    ("unlimited attention", change("self_attn.attn.impl.sliding_window", 128)),
    ("unlimited attention", change("self_attn.attn.impl.logits_soft_cap", 30.0)),
    ("attention without biases", change("self_attn.attn.impl.alibi_slopes", torch.ones(4))),
    ("attention without biases", change("self_attn.attn.impl.sinks", torch.ones(4))),
    ("cache of its own", change("self_attn.attn.kv_sharing_target_layer_name", "layers.0")),
    ("cache of its own", change("self_attn.attn.kv_cache_torch_dtype", torch.bfloat16)),
]


@pytest.mark.parametrize(("reason", "spoil"), REFUSED)
def test_one_layer_that_is_different_leaves_all_to_vllm(
    log: list[str], reason: str, spoil: Callable[[Any], None]
) -> None:
    layers = [decoder_layer(NORMED, LLAMA) for _ in range(3)]
    assert vllm_decoder._obstacle(layers, CONFIG) is None
    spoil(layers[1])
    assert fuse(*layers) == 0
    assert not any(is_fused(layer) for layer in layers)
    assert log == [f"target layers: vLLM's own, because layer 1 ({type(layers[1]).__name__}) has no {reason}"]


def test_a_transfer_of_keys_and_values_by_layer_leaves_all_to_vllm(log: list[str]) -> None:
    layer = decoder_layer()
    assert fuse(layer, config=SimpleNamespace(kv_transfer_config=object())) == 0
    assert not is_fused(layer)
    assert log == ["target layers: vLLM's own, because keys and values are transferred layer by layer"]


def test_a_model_without_such_layers_is_left_alone(log: list[str]) -> None:
    assert fuse() == 0
    assert log == ["target layers: vLLM's own, none was found"]


def test_nothing_is_fused_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(ops.kernels(), cpu_compiled=False)
    monkeypatch.setattr(ops, "kernels", lambda: absent)
    layer = decoder_layer()
    assert fuse(layer) == 0 and not is_fused(layer)


# What a fused layer computes


def cache_of(case: Case) -> torch.Tensor:
    """The case's pages as vLLM allocates them: ``[pages, kv_heads, page_size, 2 * head_dim]``."""
    pages, page_size, kv_heads, head_dim = case["key_cache"].shape
    both = torch.stack([case["key_cache"], case["value_cache"]], dim=1)
    return both.view(pages, kv_heads, page_size, 2 * head_dim)


def metadata(case: Case, rows: int) -> CPUAttentionMetadata:
    """As vLLM hands it over; ``slot_mapping`` has ``rows`` entries, none beyond those of the requests."""
    return CPUAttentionMetadata(
        num_actual_tokens=int(case["query_starts"][-1]),
        max_query_len=int(case["query_starts"].diff().max()),
        query_start_loc=case["query_starts"],
        max_seq_len=int(case["context_lens"].max()),
        seq_lens=case["context_lens"],
        block_table=case["block_tables"],
        slot_mapping=case["slot_mapping"][:rows],
        scheduler_metadata=None,
    )


def during(monkeypatch: pytest.MonkeyPatch, steps: Any) -> None:
    monkeypatch.setattr(vllm_decoder, "get_forward_context", lambda: SimpleNamespace(attn_metadata=steps))


def expected(case: Case, layer: Any) -> Outcome:
    """By the definition, with the positions' table that the layer's embedding stands for."""
    table = vllm_decoder._RotaryTables().of(layer.self_attn.rotary_emb)
    return run(reference, replace(case, arguments=case.arguments | {"rotary_table": table}))


def check(actual: tuple[torch.Tensor, torch.Tensor], cache: torch.Tensor, wanted: Outcome) -> None:
    close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-5, equal_nan=True)
    close(actual[0], wanted.output)
    close(actual[1], wanted.stream)
    close(cache.flatten(), torch.stack([wanted.keys, wanted.values], dim=1).flatten())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "classes"),
    [(PLAIN, LLAMA), (BIASED, QWEN2), (NORMED, QWEN3), (replace(PLAIN, heads=6, kv_heads=1), LLAMA)],
    ids=["llama", "qwen2", "qwen3", "one key head"],
)
def test_a_fused_layer_is_the_operator_on_vllms_pages(
    monkeypatch: pytest.MonkeyPatch, shape: LayerShape, classes: Classes, residual: bool
) -> None:
    case = DecoderRecipe(((0, 7), (9, 4), (12, 1)), shape, page_size=32, padding=3, residual=residual).make()
    first, second = decoder_layer(shape, classes), decoder_layer(PLAIN, classes, "layers.1")
    assert fuse(first, second) == 2
    first.self_attn.attn.kv_cache = cache = cache_of(case)
    during(monkeypatch, {"layers.0": metadata(case, 12), "layers.1": None})
    actual = first.forward(case["positions"], case["hidden"], case["residual"])
    check(actual, cache, expected(case, first))


def test_a_cache_that_was_allocated_anew_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM binds a first one while it measures memory."""
    layer = decoder_layer()
    assert fuse(layer) == 1
    for seed in (0, 1):
        case = DecoderRecipe(((3, 4), (0, 2)), page_size=32, seed=seed).make()
        layer.self_attn.attn.kv_cache = cache = cache_of(case)
        during(monkeypatch, {"layers.0": metadata(case, 6)})
        actual = layer.forward(case["positions"], case["hidden"], case["residual"])
        check(actual, cache, expected(case, layer))


def test_without_attention_vllms_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def theirs(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(arguments)
        return torch.ones(1), torch.zeros(1)

    layer = decoder_layer()
    layer.forward = theirs
    assert fuse(layer) == 1 and is_fused(layer)
    during(monkeypatch, None)
    given = torch.zeros(3, dtype=torch.int64), torch.ones(3, 64), None
    output, stream = layer.forward(*given)
    assert calls == [given] and (float(output), float(stream)) == (1, 0)


def test_attention_that_is_not_causal_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, case = decoder_layer(), DecoderRecipe(((3, 4),), page_size=32).make()
    assert fuse(layer) == 1
    layer.self_attn.attn.kv_cache = cache_of(case)
    during(monkeypatch, {"layers.0": replace(metadata(case, 4), causal=False)})
    with pytest.raises(AssertionError):
        layer.forward(case["positions"], case["hidden"], case["residual"])


# Parts


@pytest.mark.parametrize("head_dim", [8, 64])
def test_the_table_turns_as_vllms_embedding_does(head_dim: int) -> None:
    embedding, positions = rotary(head_dim, 300), torch.tensor([0, 1, 7, 130, 299])
    table = vllm_decoder._RotaryTables().of(embedding)
    assert table.shape == (300, 2, head_dim) and table.dtype == torch.float32 and table.is_contiguous()
    query, key = torch.randn(2, 5, 3, head_dim, generator=torch.Generator().manual_seed(0))
    wanted = embedding.forward_native(positions, query.flatten(1).clone(), key.flatten(1).clone())
    for rows, theirs in zip((query, key), wanted, strict=True):
        torch.testing.assert_close(reference.rotate(rows, table, positions).flatten(1), theirs, rtol=1e-6, atol=1e-6)


def test_layers_with_one_embedding_share_its_table() -> None:
    tables, one, other = vllm_decoder._RotaryTables(), rotary(8, 10), rotary(8, 10)
    assert tables.of(one) is tables.of(one)
    assert tables.of(one) is not tables.of(other)


@pytest.mark.parametrize(
    ("rows", "slots"), [(2, [7, 5]), (3, [7, 5, 9]), (5, [7, 5, 9, -1, -1])], ids=["fewer", "as many", "more"]
)
def test_every_row_gets_one_slot_and_padding_none(rows: int, slots: list[int]) -> None:
    mapped = vllm_decoder._for_rows(torch.tensor([7, 5, 9]), rows)
    assert mapped.tolist() == slots and mapped.dtype == torch.int64 and mapped.is_contiguous()
