"""Drafters and targets of a few thousand random parameters."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from drafter.checkpoint import Drafter
from drafter.config import DrafterConfig, InputScheme
from drafter.model import BlockDrafter
from drafter.types import TargetModel, TargetShape

HIDDEN, INNER, VOCAB, LAYERS = 16, 24, 40, 4
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 4


def shift_config(**changes: Any) -> DrafterConfig:
    """Slipstream's own kind of drafter, with every extra."""
    config = DrafterConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_layers=2,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        qk_norm=False,
        target_layer_ids=(0, 2),
        block_size=4,
        mask_token_id=3,
        markov_rank=5,
        draft_vocab_size=24,
    )
    return replace(config, **changes)


def dflash_config(**changes: Any) -> DrafterConfig:
    """A drafter as DFlash publishes them: bidirectional, query and key norms, the whole vocabulary, no extras."""
    config = shift_config(
        qk_norm=True,
        causal=False,
        input_scheme=InputScheme.DFLASH,
        last_feature=False,
        markov_rank=0,
        draft_vocab_size=VOCAB,
    )
    return replace(config, **changes)


def random_drafter(config: DrafterConfig, seed: int = 0) -> Drafter:
    """A drafter whose every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    model = BlockDrafter(config).eval()
    fill(model, generator)
    if config.draft_vocab_size == config.vocab_size:
        return Drafter(model, None)
    return Drafter(
        model, torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size].sort().values
    )


def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights: matrices that keep magnitudes, norms around one."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)


def target_shape(**changes: Any) -> TargetShape:
    """The target that the configurations above fit."""
    return replace(TargetShape(HIDDEN, VOCAB, LAYERS, "models/tiny"), **changes)


def random_target(seed: int = 1, dtype: torch.dtype = torch.float32) -> TargetModel:
    """The shared parts of a target whose output head is not its embedding; exact in float16, as serving holds it."""
    generator = torch.Generator().manual_seed(seed)
    embedding, head = (torch.randn(VOCAB, HIDDEN, generator=generator).half().to(dtype) for _ in range(2))
    return TargetModel(target_shape(), embedding, head)


def write_target(folder: Path, tied: bool = False, qk_norm: bool = False, seed: int = 2) -> dict[str, torch.Tensor]:
    """Write a Llama-style target in Hugging Face's layout and return its tensors."""
    generator = torch.Generator().manual_seed(seed)
    q_size, kv_size = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (q_size, HIDDEN),
            "self_attn.k_proj": (kv_size, HIDDEN),
            "self_attn.v_proj": (kv_size, HIDDEN),
            "self_attn.o_proj": (HIDDEN, q_size),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        if qk_norm:
            layer |= {"self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            tensors[name] = 1 + 0.2 * tensor
        elif name.startswith("model.layers."):
            tensors[name] = 0.25 * tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tensors
