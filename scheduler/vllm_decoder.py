"""The target's decoder layers on the CPU operator that runs a whole layer in one call.

vLLM's own layer is a dozen modules, each of them a Python call, an operator and memory of its own: for a handful of
tokens that costs several times what the arithmetic does. Layers that are exactly what the operator computes get it as
their ``forward``, all of a target's or none; every other keeps vLLM's. Keys and values lie in vLLM's cache, block by
block as vLLM allocates, copies and shares them, in an order of our own within a block. Attention adds up in a fixed
order, so that a token's result depends neither on the batch nor on how its prompt was cut.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models import llama, qwen2, qwen3
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from cuda_ext import ops
from cuda_ext.decoder import DecoderLayerWeights
from cuda_ext.linear import PANEL, PackedWeight
from scheduler.vllm_linear import PackedCall

logger = init_logger(__name__)

# A module of vLLM's, whose attributes no type tells.
_Module = Any

# Layers whose ``forward``, with that of their attention and of their network, is what the operator computes.
_LAYERS = {llama.LlamaDecoderLayer, qwen2.Qwen2DecoderLayer, qwen3.Qwen3DecoderLayer}
_ATTENTIONS = {cls.forward for cls in (llama.LlamaAttention, qwen2.Qwen2Attention, qwen3.Qwen3Attention)}
_ROTATIONS = ("forward_native", "forward_cpu")
_NETWORKS = {cls.forward for cls in (llama.LlamaMLP, qwen2.Qwen2MLP)}


class FusedDecoderLayer:
    """What a decoder layer's ``forward`` becomes.

    Args:
        layer: vLLM's layer, which keeps the cache and serves passes without attention (warming up).
        weights: of that layer.
        rotary_table: ``[positions, 2, head_dim]``, see ``cuda_ext.reference.rotate``.
    """

    def __init__(self, layer: _Module, weights: DecoderLayerWeights, rotary_table: torch.Tensor):
        self._vllm: Callable[..., tuple[torch.Tensor, torch.Tensor]] = layer.forward
        self._weights, self._rotary_table = weights, rotary_table
        self._attention = layer.self_attn.attn
        self._name: str = self._attention.layer_name
        self._scale: float = self._attention.impl.scale
        self._cache: torch.Tensor | None = None

    def __call__(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return self._vllm(positions, hidden_states, residual)
        assert isinstance(metadata, dict)
        step = metadata[self._name]
        assert isinstance(step, CPUAttentionMetadata) and step.causal
        if self._cache is not self._attention.kv_cache:
            self._bind_cache()
        result: tuple[torch.Tensor, torch.Tensor] = ops.decoder_layer(
            hidden_states,
            residual,
            positions,
            self._keys,
            self._values,
            _for_rows(step.slot_mapping, len(hidden_states)),
            step.block_table,
            step.seq_lens,
            step.query_start_loc,
            self._rotary_table,
            self._scale,
            *self._weights.arguments,
        )
        return result

    def _bind_cache(self) -> None:
        """Views of vLLM's pages ``[pages, kv_heads, page_size, 2 * head_dim]`` with tokens before heads."""
        self._cache = cache = self._attention.kv_cache
        pages, kv_heads, page_size, both = cache.shape
        self._keys, self._values = cache.view(pages, 2, page_size, kv_heads, both // 2).unbind(1)


def fuse_decoder_layers(model: torch.nn.Module, config: VllmConfig) -> int:
    """Give the decoder layers of a loaded target the operator, if it can serve every one of them.

    Returns:
        How many layers were fused: all, or none.
    """
    if not ops.kernels().cpu_compiled:
        return 0
    layers: list[_Module] = [module for module in model.modules() if hasattr(module, "self_attn")]
    reason = _obstacle(layers, config)
    if reason:
        logger.info("target layers: vLLM's own, %s", reason)
        return 0
    tables = _RotaryTables()
    fused = [FusedDecoderLayer(layer, _weights(layer), tables.of(layer.self_attn.rotary_emb)) for layer in layers]
    for layer, forward in zip(layers, fused, strict=True):
        layer.forward = forward
    logger.info("target layers: %d, each in one call", len(layers))
    return len(layers)


def _obstacle(layers: list[_Module], config: VllmConfig) -> str | None:
    """Why the operator cannot serve these layers, or ``None``."""
    if not layers:
        return "none was found"
    if config.kv_transfer_config is not None:
        return "because keys and values are transferred layer by layer"
    for index, layer in enumerate(layers):
        if missing := next((what for what, there in _requirements(layer) if not there), None):
            return f"because layer {index} ({type(layer).__name__}) has no {missing}"
    return None


def _requirements(layer: _Module) -> Iterable[tuple[str, bool]]:
    """What the operator needs of a layer, in an order in which each test rests on those before it."""
    yield "known form", type(layer) in _LAYERS
    attention, network = layer.self_attn, layer.mlp
    yield "known attention", type(attention).forward in _ATTENTIONS
    yield "known network", type(network).forward in _NETWORKS and type(network.act_fn) is SiluAndMul
    linears = (attention.qkv_proj, attention.o_proj, network.gate_up_proj, network.down_proj)
    yield "packed weights", all(isinstance(getattr(linear, "cpu_linear", None), PackedCall) for linear in linears)
    yield "undivided weights", all(getattr(linear, "tp_size", 1) == 1 for linear in linears)
    yield "plain projections", all(linear.bias is None for linear in linears[1:])
    yield f"inner width of whole panels of {PANEL}", _packed(network.down_proj).in_features % PANEL == 0
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attention)]
    yield "plain norms", all(type(norm) is RMSNorm and norm.variance_size_override is None for norm in norms)
    yield "one epsilon", len({norm.variance_epsilon for norm in norms}) == 1
    rotary = attention.rotary_emb
    kind = type(rotary)
    yield "rotary embedding", isinstance(rotary, RotaryEmbedding)
    yield (
        "plain rotation",
        kind.forward_native is RotaryEmbedding.forward_native and kind.forward_cpu is RotaryEmbedding.forward_cpu,
    )
    yield "rotation of whole heads", rotary.is_neox_style and rotary.rotary_dim == rotary.head_size
    inner = attention.attn
    impl = inner.impl
    yield "paged attention", isinstance(impl, CPUAttentionBackendImpl)
    yield "causal attention", inner.attn_type == AttentionType.DECODER
    yield "unlimited attention", impl.sliding_window == -1 and not impl.logits_soft_cap
    yield "attention without biases", impl.alibi_slopes is None and impl.sinks is None
    yield "cache of its own", inner.kv_sharing_target_layer_name is None and inner.kv_cache_torch_dtype == torch.float32


def _head_norms(attention: _Module) -> list[_Module]:
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return [norm for norm in norms if isinstance(norm, torch.nn.Module)]


def _packed(linear: _Module) -> PackedWeight:
    call = linear.cpu_linear
    assert isinstance(call, PackedCall)
    return call.packed


def _weights(layer: _Module) -> DecoderLayerWeights:
    attention, network = layer.self_attn, layer.mlp
    query_norm, key_norm = [norm.weight.data for norm in _head_norms(attention)] or (None, None)
    bias = attention.qkv_proj.bias
    return DecoderLayerWeights(
        input_norm=layer.input_layernorm.weight.data,
        post_norm=layer.post_attention_layernorm.weight.data,
        eps=layer.input_layernorm.variance_epsilon,
        qkv=_packed(attention.qkv_proj),
        output=_packed(attention.o_proj),
        gate_up=_packed(network.gate_up_proj),
        down=_packed(network.down_proj),
        heads=attention.num_heads,
        qkv_bias=None if bias is None else bias.data,
        query_norm=query_norm,
        key_norm=key_norm,
    )


class _RotaryTables:
    """One table for all layers that share an embedding."""

    def __init__(self) -> None:
        self._tables: dict[int, torch.Tensor] = {}

    def of(self, rotary: _Module) -> torch.Tensor:
        """``[positions, 2, head_dim]`` float32."""
        if id(rotary) not in self._tables:
            cosines, sines = rotary.cos_sin_cache.float().chunk(2, dim=-1)
            rows = [torch.cat([cosines, cosines], dim=-1), torch.cat([-sines, sines], dim=-1)]
            self._tables[id(rotary)] = torch.stack(rows, dim=1).contiguous()
        return self._tables[id(rotary)]


def _for_rows(slot_mapping: torch.Tensor, rows: int) -> torch.Tensor:
    """One slot for each row, -1 for padding."""
    if len(slot_mapping) >= rows:
        return slot_mapping[:rows] if len(slot_mapping) > rows else slot_mapping
    return torch.nn.functional.pad(slot_mapping, (0, rows - len(slot_mapping)), value=-1)
