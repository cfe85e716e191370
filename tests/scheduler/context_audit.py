"""Compares the drafter's cached context K/V with a fresh computation, inside a real engine; run as a process.

The engine runs in this process so that its pages can be read. After every step the pages of every request are
copied; at the end each copy is compared with keys and values computed anew from hidden states that Hugging Face's
implementation of the target gives for the same tokens. One JSON line is printed.

Usage: ``python -m tests.scheduler.context_audit MODEL DRAFTER``
"""

import itertools
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from drafter.options import ProposalOptions
from drafter.proposer import BlockDiffusionProposer
from drafter.types import Drafts, TargetForward
from scheduler.engine import EngineShape, engine_arguments
from scheduler.options import DrafterOptions, EngineOptions, PolicyName, PolicyOptions
from scheduler.policy import SurvivalFloor

_MAX_LEN = 256


@dataclass
class Audit:
    """Copies of cached K/V by request, the latest of each, and the first position that was run of each."""

    copies: dict[str, tuple[list[int], list[torch.Tensor]]] = field(default_factory=dict)
    first_positions: dict[str, int] = field(default_factory=dict)
    accepted: int = 0
    rejected: int = 0


def watch(proposer: BlockDiffusionProposer, runner: Any, audit: Audit) -> None:
    """Copy what the proposer holds, after every third pass: between them it may keep passes to itself."""
    propose, passes = proposer.propose, itertools.count()

    def propose_and_copy(forward: TargetForward) -> Drafts:
        drafts = propose(forward)
        if next(passes) % 3:
            return drafts
        proposer.settle()
        page_size = proposer.page_tensors()[0].shape[2]
        for r, request_id in enumerate(forward.request_ids):
            length = int(forward.context_lens[r])
            slots = torch.arange(length)
            pages = forward.block_table[r][slots // page_size].long()
            kv = [tensor[pages, :, slots % page_size].clone() for tensor in proposer.page_tensors()]
            name = request_id.split("-")[0]
            audit.first_positions.setdefault(name, int(forward.positions[forward.row_starts[r]]))
            audit.copies[name] = (runner.input_batch.token_ids_cpu[r, :length].tolist(), kv)
            rows = int(forward.row_starts[r + 1] - forward.row_starts[r])
            if length > forward.prompt_lens[r] and len(forward.sampled[r]) and rows > 1:
                audit.accepted += len(forward.sampled[r]) - 1
                audit.rejected += rows - len(forward.sampled[r])
        return drafts

    proposer.propose = propose_and_copy  # type: ignore[method-assign]


def run(engine: LLMEngine, requests: dict[str, tuple[list[int], int]]) -> None:
    """Run requests, ``name: (prompt, tokens to write)``, together to their end."""
    for name, (prompt, count) in requests.items():
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        engine.step()


def fresh_kv(model: Any, proposer: BlockDiffusionProposer, tokens: list[int]) -> list[torch.Tensor]:
    """Per drafter layer ``[tokens, 2, kv_heads, head_dim]``, from scratch."""
    outputs: dict[int, torch.Tensor] = {}
    wanted = proposer.hidden_state_layers
    hooks = [
        model.model.layers[layer - 1].register_forward_hook(
            lambda _module, _inputs, output, layer=layer: outputs.__setitem__(
                layer, output[0] if isinstance(output, tuple) else output
            )
        )
        for layer in wanted
    ]
    with torch.inference_mode():
        model(torch.tensor([tokens]))
        hidden = torch.cat([outputs[layer].reshape(len(tokens), -1) for layer in wanted], dim=-1)
        drafter = proposer._drafter.model
        features = drafter.context_features(hidden)
        kv = [torch.stack(pair, dim=1) for pair in drafter.context_kv(features, torch.arange(len(tokens)))]
    for hook in hooks:
        hook.remove()
    return kv


def main(model_folder: str, drafter_folder: str) -> None:
    """Run every phase and print, per request, the largest relative error."""
    shape = EngineShape(
        model_folder, max_model_len=_MAX_LEN, max_num_seqs=4, max_num_batched_tokens=64, kv_cache_bytes=64 << 20
    )
    options = EngineOptions(
        DrafterOptions(Path(drafter_folder), ProposalOptions(5), PolicyOptions(PolicyName.FIXED, repetition=False))
    )
    engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(shape, options), skip_tokenizer_init=True))
    core: Any = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    proposer = runner.drafter.proposer
    audit = Audit()
    watch(proposer, runner, audit)

    tokens = torch.randint(100, 20_000, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    prefix = tokens[:150]  # more than two steps' worth: read in chunks
    run(engine, {"chunked": (prefix, 12)})
    run(engine, {"hit": ([*prefix, *tokens[200:220]], 12), "other": (tokens[300:330], 20)})
    core.scheduler._policy = SurvivalFloor(1.1, 5)  # nothing is verified: plain decoding, context K/V all the same
    run(engine, {"plain": (tokens[240:270], 20)})
    core.scheduler._policy = SurvivalFloor(0.0, 5)
    run(engine, {"drafted": (tokens[240:270], 20)})  # again, now with drafts that are verified
    run(engine, {"longest": (tokens[:232], 64), "neighbour": (tokens[330:360], 40)})
    run(engine, {"after": ([*audit.copies["plain"][0], *tokens[380:390]], 12)})

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    errors = {}
    for name, (ids, cached) in audit.copies.items():
        pairs = zip(cached, fresh_kv(model, proposer, ids), strict=True)
        errors[name] = max(float((old - new).abs().max() / new.abs().max()) for old, new in pairs)
    lengths = {name: len(ids) for name, (ids, _) in audit.copies.items()}
    plain, drafted = audit.copies["plain"][0], audit.copies["drafted"][0]
    common = min(len(plain), len(drafted))
    report = {
        "errors": errors,
        "lengths": lengths,
        "first_positions": audit.first_positions,
        "accepted": audit.accepted,
        "rejected": audit.rejected,
        "same_answer": plain[:common] == drafted[:common],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
