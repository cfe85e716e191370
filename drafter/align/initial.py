"""A drafter to start training from: the target's own layers, and projections that change nothing at first."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from drafter.align.corpus import Corpus
from drafter.checkpoint import Drafter
from drafter.config import DrafterConfig, InputScheme
from drafter.model import BlockDrafter, DrafterLayer


@dataclass(frozen=True, slots=True)
class TargetWeights:
    """What training needs of the target; it is never trained.

    Attributes:
        embedding: ``[vocab, hidden]``.
        output_head: ``[vocab, hidden]``.
        final_norm: ``[hidden]`` factors of the norm before the output head.
        config: content of the target's ``config.json``.
    """

    folder: Path
    embedding: torch.Tensor
    output_head: torch.Tensor
    final_norm: torch.Tensor
    config: dict[str, Any]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the target by its Hugging Face name, as float32."""
        return read_tensor(self.folder, name)

    def holds(self, name: str) -> bool:
        """Whether the target has such a tensor."""
        try:
            read_tensor(self.folder, name)
        except KeyError:
            return False
        return True

    def norm(self, name: str) -> torch.Tensor:
        """The factors of a norm by its Hugging Face name."""
        return _read_norm(self.folder, self.config, name)


def is_gemma(config: dict[str, Any]) -> bool:
    """Whether a target is of the Gemma family, whose layers have norms behind attention and MLP as well."""
    return str(config.get("model_type", "")).startswith("gemma")


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """Read one tensor of a safetensors model folder, sharded or not, as float32.

    Raises:
        KeyError: no file of the folder holds it.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor.to(torch.float32)
    raise KeyError(f"{folder} holds no tensor {name}")


def read_target(folder: Path) -> TargetWeights:
    """Read the shared parts of a target of Llama's, Qwen's or Gemma's kind."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    embedding = read_tensor(folder, "model.embed_tokens.weight")
    head = embedding if config.get("tie_word_embeddings") else read_tensor(folder, "lm_head.weight")
    return TargetWeights(folder, embedding, head, _read_norm(folder, config, "model.norm.weight"), config)


def _read_norm(folder: Path, config: dict[str, Any], name: str) -> torch.Tensor:
    """The factors of a norm: Gemma's weights are what they differ from 1 by."""
    weight = read_tensor(folder, name)
    return weight + 1 if is_gemma(config) else weight


def drafter_config(
    target: TargetWeights,
    *,
    copied_layers: tuple[int, ...],
    target_layer_ids: tuple[int, ...],
    block_size: int,
    draft_vocab_size: int,
    mask_token_id: int,
    markov_rank: int = 64,
    plain_dflash: bool = False,
) -> DrafterConfig:
    """The shape of a drafter for a target: layers like the target's own, fewer of them.

    Args:
        block_size: draft tokens.
        plain_dflash: as DFlash publishes them, so that vLLM's own proposer runs them too: an anchor slot that predicts
            nothing, bidirectional blocks, norms of queries and keys, the whole vocabulary and no extras.
    """
    config: dict[str, Any] = target.config
    heads = config["num_attention_heads"]
    vocab_size = config["vocab_size"]
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return DrafterConfig(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=len(copied_layers),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=vocab_size,
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or config["rope_theta"]),
        qk_norm=plain_dflash or config["model_type"] == "qwen3" or is_gemma(config),
        target_layer_ids=target_layer_ids,
        block_size=block_size + plain_dflash,
        mask_token_id=mask_token_id,
        causal=not plain_dflash,
        input_scheme=InputScheme.DFLASH if plain_dflash else InputScheme.SHIFT,
        last_feature=not plain_dflash,
        markov_rank=0 if plain_dflash else markov_rank,
        draft_vocab_size=vocab_size if plain_dflash else min(draft_vocab_size, vocab_size),
    )


def spread_layer_ids(num_layers: int, count: int) -> tuple[int, ...]:
    """Target layers to read: ``count - 1`` spread as DFlash does (``1`` to ``N - 3``), and the last one.

    The last layer's output is what the target's own head reads, so the recording also holds the target's
    distribution over next tokens.
    """
    spread = count - 1
    step = (num_layers - 4) / max(spread - 1, 1)
    return (*(round(1 + i * step) for i in range(spread)), num_layers - 1)


def frequent_tokens(corpus: Corpus, size: int, vocab_size: int) -> tuple[torch.Tensor, float]:
    """The draft vocabulary: the ``size`` most frequent tokens of the corpus, the smallest ids filling up.

    Returns:
        ``[size]`` sorted int64 token ids, and the share of corpus tokens that they cover.
    """
    counts: Counter[int] = Counter()
    for index in range(len(corpus)):
        counts.update(corpus.token_ids(index).tolist())
    chosen = [token for token, _ in counts.most_common(size)]
    covered = sum(counts[token] for token in chosen) / max(counts.total(), 1)
    known = set(chosen)
    chosen += [token for token in range(vocab_size) if token not in known][: size - len(chosen)]
    return torch.tensor(sorted(chosen)), covered


def initial_drafter(
    config: DrafterConfig, target: TargetWeights, token_ids: torch.Tensor | None, layer_ids: tuple[int, ...], seed: int
) -> Drafter:
    """Build a drafter whose layers are copies of the target's layers ``layer_ids``.

    The context projection passes through the hidden state that the first copied layer reads (or the nearest one
    recorded), under that layer's own input norm, so that the copied key and value projections see what they know.
    """
    torch.manual_seed(seed)
    model = BlockDrafter(config)
    for layer, source in zip(model.layers, layer_ids, strict=True):
        assert isinstance(layer, DrafterLayer)
        _copy_layer(layer, target, source)
    recorded = config.hidden_state_layers
    nearest = min(range(len(recorded)), key=lambda i: abs(recorded[i] - layer_ids[0]))
    hidden = config.hidden_size
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.weight[:, nearest * hidden : (nearest + 1) * hidden] = torch.eye(hidden)
        model.hidden_norm.weight.copy_(target.norm(f"model.layers.{layer_ids[0]}.input_layernorm.weight"))
        model.norm.weight.copy_(target.final_norm)
        if model.last_feature_proj is not None:
            model.last_feature_proj.weight.zero_()
        if model.markov is not None:
            model.markov.previous.weight.normal_(std=0.02)
            model.markov.logits.weight.zero_()
    return Drafter(model, token_ids)


def _copy_layer(layer: DrafterLayer, target: TargetWeights, source: int) -> None:
    """What the layers of both have in common: Gemma's norms behind attention and MLP have no counterpart here."""

    layers = f"model.layers.{source}"

    def weight(name: str) -> torch.Tensor:
        return target.tensor(f"{layers}.{name}.weight")

    def norm(name: str) -> torch.Tensor:
        return target.norm(f"{layers}.{name}.weight")

    with torch.no_grad():
        layer.input_layernorm.weight.copy_(norm("input_layernorm"))
        before_mlp = "pre_feedforward_layernorm" if is_gemma(target.config) else "post_attention_layernorm"
        layer.post_attention_layernorm.weight.copy_(norm(before_mlp))
        layer.qkv_proj.weight.copy_(torch.cat([weight(f"self_attn.{k}_proj") for k in "qkv"]))
        layer.o_proj.weight.copy_(weight("self_attn.o_proj"))
        layer.gate_up_proj.weight.copy_(torch.cat([weight("mlp.gate_proj"), weight("mlp.up_proj")]))
        layer.down_proj.weight.copy_(weight("mlp.down_proj"))
        if layer.q_norm is not None and layer.k_norm is not None and target.holds(f"{layers}.self_attn.q_norm.weight"):
            layer.q_norm.weight.copy_(norm("self_attn.q_norm"))
            layer.k_norm.weight.copy_(norm("self_attn.k_norm"))
