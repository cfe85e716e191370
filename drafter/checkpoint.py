"""Loading and saving drafters in DFlash's format.

``config.json`` and ``model.safetensors`` follow DFlash: any reader of that format finds the tensors it knows under
the names it knows. What DFlash has no name for (slot embeddings, last-feature projection, Markov head, draft
vocabulary) lies beside it in ``slipstream.safetensors``.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from drafter.config import DrafterConfig, read_config
from drafter.errors import DrafterCheckpointError
from drafter.head import DraftHead
from drafter.model import BlockDrafter
from drafter.types import TargetModel, TargetShape

_DFLASH_FILE = "model.safetensors"
_EXTRA_FILE = "slipstream.safetensors"
_VOCABULARY = "draft_vocabulary"


@dataclass(frozen=True, slots=True)
class Drafter:
    """A drafter with its vocabulary: ``token_ids`` ``[draft_vocab]`` int64, or ``None`` for the target's whole one."""

    model: BlockDrafter
    token_ids: torch.Tensor | None

    def head(self, target: TargetModel) -> DraftHead:
        """The draft head over rows of the target's output head, in float32."""
        token_ids = None if self.token_ids is None else self.token_ids.to(target.output_head.device)
        rows = target.output_head if token_ids is None else target.output_head[token_ids]
        return DraftHead(rows.to(torch.float32).contiguous(), token_ids, self.model.markov)


def load_drafter(folder: Path, dtype: torch.dtype = torch.float32) -> Drafter:
    """Read a checkpoint folder.

    Raises:
        DrafterCheckpointError: a file is missing or broken, or its tensors do not match the configuration.
    """
    config = read_config(folder)
    model = BlockDrafter(config)
    stored = {name.removeprefix("model."): tensor for name, tensor in _read(folder / _DFLASH_FILE).items()}
    extra = _read(folder / _EXTRA_FILE) if (folder / _EXTRA_FILE).exists() else {}
    token_ids = _draft_vocabulary(extra.pop(_VOCABULARY, None), config, folder)
    expected, expected_extra = _split(model.state_dict())
    _check_tensors({**_to_dflash(expected, config), **expected_extra}, {**stored, **extra}, folder)
    model.load_state_dict({**_from_dflash(stored, config), **extra})
    return Drafter(model.to(dtype).eval(), token_ids)


def save_drafter(drafter: Drafter, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a checkpoint folder; each file appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    state, extra = _split(
        {name: tensor.detach().to(dtype).contiguous() for name, tensor in drafter.model.state_dict().items()}
    )
    if drafter.token_ids is not None:
        extra[_VOCABULARY] = drafter.token_ids.to(torch.int32)
    _write(_to_dflash(state, drafter.model.config), folder / _DFLASH_FILE)
    if extra:
        _write(extra, folder / _EXTRA_FILE)
    else:
        (folder / _EXTRA_FILE).unlink(missing_ok=True)
    unfinished = folder / "config.json.partial"
    unfinished.write_text(json.dumps(drafter.model.config.to_json(), indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / "config.json")


def check_fits(config: DrafterConfig, target: TargetShape, source: str) -> None:
    """Raise ``DrafterCheckpointError`` unless a drafter of this configuration can read this target."""
    problems = []
    if config.hidden_size != target.hidden_size:
        problems.append(f"hidden size {config.hidden_size} against {target.hidden_size}")
    if config.vocab_size != target.vocab_size:
        problems.append(f"vocabulary {config.vocab_size} against {target.vocab_size}")
    if bad := [i for i in config.target_layer_ids if not 0 <= i < target.num_layers]:
        problems.append(f"it reads target layers {bad} of {target.num_layers}")
    if config.vocab_size == target.vocab_size and not 0 <= config.mask_token_id < target.vocab_size:
        problems.append(f"mask token {config.mask_token_id} of a vocabulary of {target.vocab_size}")
    if problems:
        raise DrafterCheckpointError(f"drafter {source} does not fit target {target.path}: {'; '.join(problems)}")


_EXTRA_MODULES = ("slot_embedding", "last_feature_proj", "markov")


def _split(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors that DFlash has names for, and the others."""
    extra = {name: tensor for name, tensor in state.items() if name.split(".")[0] in _EXTRA_MODULES}
    return {name: tensor for name, tensor in state.items() if name not in extra}, extra


def _draft_vocabulary(stored: torch.Tensor | None, config: DrafterConfig, folder: Path) -> torch.Tensor | None:
    """The draft vocabulary as int64, checked against the configuration."""
    if stored is None:
        if config.draft_vocab_size != config.vocab_size:
            raise DrafterCheckpointError(
                f"{folder}: a draft vocabulary of {config.draft_vocab_size} tokens is not stored"
            )
        return None
    if stored.shape != (config.draft_vocab_size,):
        raise DrafterCheckpointError(
            f"{folder}: draft vocabulary of {stored.numel()} tokens stored, {config.draft_vocab_size} by config.json"
        )
    if int(stored.min()) < 0 or int(stored.max()) >= config.vocab_size:
        raise DrafterCheckpointError(
            f"{folder}: draft vocabulary has token ids outside of 0 to {config.vocab_size - 1}"
        )
    return stored.long()


def _check_tensors(expected: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Names and shapes of what is stored must be those of the configuration."""
    if wrong := sorted(set(expected) ^ set(stored)):
        raise DrafterCheckpointError(f"{folder}: tensors do not match config.json: {', '.join(wrong[:4])}")
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)} stored, {list(expected[name].shape)} by config.json"
            raise DrafterCheckpointError(f"{folder}: tensor {name} has the wrong shape: {shapes}")


def _to_dflash(state: Mapping[str, torch.Tensor], config: DrafterConfig) -> dict[str, torch.Tensor]:
    """Our fused tensors under DFlash's names, one per projection."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("qkv_proj.weight"):
            base = name.replace("qkv_proj", "self_attn.{}_proj")
            parts = tensor.split([q_size, kv_size, kv_size])
            result.update({base.format(k): part.contiguous() for k, part in zip("qkv", parts, strict=True)})
        elif name.endswith("gate_up_proj.weight"):
            base = name.replace("gate_up_proj", "mlp.{}_proj")
            result.update(
                {base.format(k): p.contiguous() for k, p in zip(("gate", "up"), tensor.chunk(2), strict=True)}
            )
        elif name.startswith("layers."):
            layer, index, module, rest = name.split(".", 3)
            group = {"o_proj": "self_attn.", "q_norm": "self_attn.", "k_norm": "self_attn.", "down_proj": "mlp."}
            result[f"{layer}.{index}.{group.get(module, '')}{module}.{rest}"] = tensor
        else:
            result[name] = tensor
    return result


def _from_dflash(stored: Mapping[str, torch.Tensor], config: DrafterConfig) -> dict[str, torch.Tensor]:
    """DFlash's tensors, all of them, fused as our layers hold them."""
    rest = dict(stored)
    result: dict[str, torch.Tensor] = {}
    for i in range(config.num_layers):
        for fused, parts in (
            ("qkv_proj", [f"self_attn.{k}_proj" for k in "qkv"]),
            ("gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            tensors = [rest.pop(f"layers.{i}.{part}.weight") for part in parts]
            result[f"layers.{i}.{fused}.weight"] = torch.cat(tensors)
    for name, tensor in rest.items():
        result[name.replace(".self_attn.", ".").replace(".mlp.", ".")] = tensor
    return result


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise DrafterCheckpointError(f"{path.parent} is not a drafter checkpoint: {path.name} is missing") from error
    except SafetensorError as error:
        raise DrafterCheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    unfinished = path.with_suffix(".partial")
    save_file(tensors, unfinished)
    os.replace(unfinished, path)
