"""The model card that travels with a drafter."""

import os
from pathlib import Path

from drafter.align.provenance import Provenance


def write_card(path: Path, provenance: Provenance, parameters: int, licence: str) -> None:
    """Write the card as Markdown; the file appears complete or not at all.

    Args:
        path: ``README.md`` of the checkpoint folder.
        provenance: how the checkpoint was made, and what it reaches on held-out answers.
        parameters: weights of the drafter.
        licence: of the target and of the prompts, for whoever passes the checkpoint on.
    """
    rows = "\n".join(_row(provenance, category) for category in provenance.result)
    initial = provenance.training.get("initial")
    start = "" if initial is None else f", going on from the drafter `{initial['name']}`"
    text = f"""# Block-diffusion drafter for {provenance.target}

A drafter for speculative decoding: it proposes a block of tokens from the target's hidden states in one pass, and
the target verifies them. It cannot write text by itself, and it changes nothing of what the target says.

| | |
|---|---|
| parameters | {parameters / 1e6:.1f} million; embedding and output head are the target's and are not included |
| format | DFlash (`config.json`, `model.safetensors`), with `slipstream.safetensors` for what that lacks |
| data | {provenance.corpus["answers"]:,} answers of the target, {provenance.corpus["answer_tokens"]:,} tokens, \
at temperatures 0 and 0.7; prompts: {_prompts(provenance)} |
| training | {provenance.training["steps"]:,} steps, {provenance.seconds / 60:.0f} minutes \
on {provenance.versions["processor"]}{start} |
| licence | {licence} |

Emitted tokens per verify step on answers to prompts that were kept from training:

| prompts | temperature 0 | temperature 1 |
|---|---|---|
{rows}

`provenance.json` has the command, the versions, the data and the seed.
"""
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _row(provenance: Provenance, category: str) -> str:
    sampled = provenance.sampled_result.get(category)
    return f"| {category} | {provenance.result[category]:.2f} | {'' if sampled is None else f'{sampled:.2f}'} |"


def _prompts(provenance: Provenance) -> str:
    given, own = provenance.prompts, f"{provenance.own_prompts:,} written by the target itself"
    if given is None:
        return own
    return f"{given.prompts:,} from `{given.name}`" + (f", {own}" if provenance.own_prompts else "")
