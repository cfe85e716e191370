"""The drafter's shape, in DFlash's ``config.json`` format, with what DFlash lacks under ``slipstream_config``."""

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from drafter.errors import DrafterCheckpointError


class InputScheme(StrEnum):
    """What the slots of a block read and predict.

    ``DFLASH``: an anchor and masks, each mask predicts the token at its own position (arXiv 2602.06036).
    ``SHIFT``: the same inputs, but every slot, the anchor's included, predicts the next token (DSpark,
    arXiv 2607.05147); slots have embeddings of their own.
    """

    DFLASH = "dflash"
    SHIFT = "shift"


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """Everything needed to build a drafter.

    Attributes:
        hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: layer shapes.
        vocab_size: the target's vocabulary.
        rms_norm_eps, rope_theta: as in the target's family; rotary embedding in half-split (NeoX) layout.
        qk_norm: RMS norm on the heads of queries and keys (Qwen3 style).
        target_layer_ids: decoder layers of the target whose outputs are read, counted from 0 as DFlash does.
        block_size: slots of a block, the anchor included.
        mask_token_id: row of the target's embedding that stands for a slot not yet known.
        causal: slots attend to earlier slots of the block only.
        input_scheme: see ``InputScheme``.
        last_feature: every slot also reads the context feature of the last verified token (as EAGLE does).
        markov_rank: rank of the head that conditions a slot on the token before it; 0 for none (DSpark).
        draft_vocab_size: tokens that the drafter can propose; ``vocab_size`` for all.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    qk_norm: bool
    target_layer_ids: tuple[int, ...]
    block_size: int
    mask_token_id: int
    causal: bool = True
    input_scheme: InputScheme = InputScheme.SHIFT
    last_feature: bool = True
    markov_rank: int = 64
    draft_vocab_size: int = 8192

    @property
    def num_draft_tokens(self) -> int:
        """Tokens that one block proposes: DFlash's anchor slot predicts nothing."""
        return self.block_size if self.input_scheme is InputScheme.SHIFT else self.block_size - 1

    @property
    def hidden_state_layers(self) -> tuple[int, ...]:
        """Indices into the target's hidden states: 0 is the embedding, ``i + 1`` the output of decoder layer ``i``."""
        return tuple(layer + 1 for layer in self.target_layer_ids)

    @property
    def feature_size(self) -> int:
        """Width of the concatenated hidden states that the drafter projects into its context."""
        return self.hidden_size * len(self.target_layer_ids)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of paged cache for one token of context: float32 keys and values of every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 4

    def to_json(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3" if self.qk_norm else "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "block_size": self.block_size,
            "dflash_config": {
                "mask_token_id": self.mask_token_id,
                "target_layer_ids": list(self.target_layer_ids),
                "causal": self.causal,
            },
            "slipstream_config": {
                "input_scheme": self.input_scheme.value,
                "last_feature": self.last_feature,
                "markov_rank": self.markov_rank,
                "draft_vocab_size": self.draft_vocab_size,
            },
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str) -> "DrafterConfig":
        """Read a DFlash configuration, ours or a public one.

        Args:
            data: content of ``config.json``.
            source: where it came from, for messages.

        Raises:
            DrafterCheckpointError: a key is missing or asks for something this drafter does not do.
        """
        try:
            dflash, extra = data.get("dflash_config", {}), data.get("slipstream_config", {})
            rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                raise DrafterCheckpointError(f"{source}: rotary embedding of type {kind!r} is not supported")
            return cls(
                hidden_size=data["hidden_size"],
                intermediate_size=data["intermediate_size"],
                num_layers=data["num_hidden_layers"],
                num_heads=data["num_attention_heads"],
                num_kv_heads=data["num_key_value_heads"],
                head_dim=data.get("head_dim") or data["hidden_size"] // data["num_attention_heads"],
                vocab_size=data["vocab_size"],
                rms_norm_eps=data["rms_norm_eps"],
                rope_theta=float(rope.get("rope_theta") or data["rope_theta"]),
                qk_norm=data.get("model_type") == "qwen3",
                target_layer_ids=tuple(dflash["target_layer_ids"]),
                block_size=data["block_size"],
                mask_token_id=dflash["mask_token_id"],
                causal=bool(dflash.get("causal", False)),
                input_scheme=_input_scheme(extra.get("input_scheme", "dflash"), source),
                last_feature=extra.get("last_feature", False),
                markov_rank=extra.get("markov_rank", 0),
                draft_vocab_size=extra.get("draft_vocab_size", data["vocab_size"]),
            )
        except KeyError as error:
            raise DrafterCheckpointError(f"{source}: not a DFlash drafter configuration, {error} is missing") from error
        except (AttributeError, TypeError) as error:
            raise DrafterCheckpointError(f"{source}: not a DFlash drafter configuration ({error})") from error


def _input_scheme(name: str, source: str) -> InputScheme:
    try:
        return InputScheme(name)
    except ValueError as error:
        known = ", ".join(InputScheme)
        raise DrafterCheckpointError(f"{source}: unknown input scheme {name!r}; known are {known}") from error


def read_config(folder: Path) -> DrafterConfig:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        DrafterCheckpointError: the folder holds none, or it cannot be read.
    """
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DrafterCheckpointError(f"{folder} is not a drafter checkpoint: it has no config.json") from error
    except ValueError as error:
        raise DrafterCheckpointError(f"{path}: not valid JSON ({error})") from error
    return DrafterConfig.from_json(data, str(path))
