"""A drafter of ours in unmodified vLLM, under its own ``method: "dflash"``; run as a process.

Prints one JSON line: the drafts that vLLM's proposer made behind the first token of every answer, and ours behind the
same tokens, computed densely from hidden states that Hugging Face's implementation of the target gives; and what was
answered with drafts and without.

Usage: ``python -m tests.drafter.dflash_in_vllm FOLDER``
"""

import gc
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from drafter.align.batches import make_batch, run_blocks
from drafter.align.corpus import Answer, AnswerId
from drafter.checkpoint import Drafter, load_drafter, save_drafter
from drafter.types import TargetModel, TargetShape
from tests.drafter.tiny import dflash_config, random_drafter

_VOCAB, _HIDDEN, _LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM = 512, 96, 6, 8, 1, 32
_DRAFTS, _NEW_TOKENS = 4, 10
_PROMPTS = (5, 16, 40, 63, 100, 150)  # tokens


def write_target(folder: Path) -> None:
    """A random Qwen3 whose output head is its embedding."""
    config = Qwen3Config(
        vocab_size=_VOCAB,
        hidden_size=_HIDDEN,
        intermediate_size=160,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=0.5)
    model.save_pretrained(folder)


def write_drafter(folder: Path) -> None:
    """What DFlash publishes: bidirectional blocks, norms of queries and keys, the target's whole vocabulary."""
    config = dflash_config(
        hidden_size=_HIDDEN,
        intermediate_size=160,
        num_heads=_HEADS,
        num_kv_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        vocab_size=_VOCAB,
        rms_norm_eps=1e-6,
        target_layer_ids=(1, 3),
        block_size=_DRAFTS + 1,
        mask_token_id=4,
        draft_vocab_size=_VOCAB,
    )
    drafter = random_drafter(config)
    first, second = (drafter.model.get_parameter(f"layers.{layer}.k_norm.weight") for layer in (0, 1))
    with torch.no_grad():
        # On CPUs vLLM 0.32 norms the context keys of all layers with the first layer's weights: its fused call hands
        # the kernel one row of them a layer, and the CPU's kernel reads the first row only.
        second.copy_(first)
    save_drafter(drafter, folder, torch.float32)


@dataclass
class Served:
    """By request: its tokens at the first draft behind them, that draft, and all of its tokens in the end."""

    first: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)


def serve(target: Path, speculation: dict[str, Any] | None) -> Served:
    """Answer all prompts in vLLM as it is."""
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            str(target),
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=256,
            dtype="float32",
            kv_cache_memory_bytes=32 << 20,
            speculative_config=speculation,
        )
    )
    core: Any = engine.engine_core.engine_core
    params = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, detokenize=False, ignore_eos=True)
    for length in _PROMPTS:
        prompt = torch.randint(0, _VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        engine.add_request(str(length), {"prompt_token_ids": prompt}, params)
    served = Served()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                served.answers[output.request_id] = list(output.outputs[0].token_ids)
        for request in core.scheduler.requests.values():
            if request.spec_token_ids and request.num_output_tokens == 1:
                name = request.request_id.split("-")[0]
                served.first.setdefault(name, (list(request.all_token_ids), list(request.spec_token_ids)))
    del engine, core
    cleanup_dist_env_and_memory()
    gc.collect()
    return served


@torch.inference_mode()
def drafts_of_ours(drafter: Drafter, hf_model: Any, tokens: list[int]) -> list[int]:
    """The same drafts, from scratch."""
    config = drafter.model.config
    states = hf_model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    hidden = {layer: states[layer][0] for layer in config.hidden_state_layers}
    anchor = len(tokens) - 1
    padded = torch.tensor([*tokens, 0])
    answer = Answer(AnswerId("text", 0, 0.0), 1, padded, {k: torch.cat([v, v[-1:]]) for k, v in hidden.items()})
    batch = make_batch([answer], [torch.tensor([anchor])], config)
    embedding = hf_model.model.embed_tokens.weight
    shape = TargetShape(_HIDDEN, _VOCAB, _LAYERS, "target")
    head = drafter.head(TargetModel(shape, embedding, embedding))
    drafted: list[int] = (
        head.walk(head.logits(run_blocks(drafter.model, batch, embedding)), batch.anchor_tokens).tokens[0].tolist()
    )
    return drafted


def main(folder: Path) -> None:
    """Draft both ways and print what came of it."""
    write_target(folder / "target")
    write_drafter(folder / "drafter")
    plain = serve(folder / "target", None)
    speculation = {"method": "dflash", "model": str(folder / "drafter"), "num_speculative_tokens": _DRAFTS}
    drafted = serve(folder / "target", speculation)
    drafter = load_drafter(folder / "drafter")
    hf_model = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    ours = {name: drafts_of_ours(drafter, hf_model, tokens) for name, (tokens, _) in drafted.first.items()}
    report = {
        "vllm": {name: drafts for name, (_, drafts) in drafted.first.items()},
        "ours": ours,
        "same_answers": plain.answers == drafted.answers,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
