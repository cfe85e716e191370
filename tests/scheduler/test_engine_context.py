"""The drafter's context K/V stay right through everything the engine does with pages."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from drafter.checkpoint import save_drafter
from server.config import load_settings
from server.drafter_store import resolve_drafter
from server.model_store import resolve_model
from tests.drafter.tiny import random_drafter, shift_config
from tests.process_report import report_of

_AUDIT = "tests.scheduler.context_audit"
_TOLERANCE = 1e-3  # of the largest value: hidden states of two implementations of the target, in float32
_HIDDEN, _HEAD_DIM, _LAYERS, _VOCAB = 64, 32, 6, 20_480


def check(report: Any) -> None:
    names = {"chunked", "hit", "other", "plain", "drafted", "longest", "neighbour", "after"}
    assert set(report["errors"]) == names
    assert report["lengths"]["longest"] >= 250
    assert report["first_positions"]["hit"] > 0  # the pages before it came from the prefix cache
    assert report["rejected"] > 0 and report["same_answer"]
    assert max(report["errors"].values()) < _TOLERANCE, report


def test_cached_context_equals_a_fresh_computation() -> None:
    settings = load_settings("smollm2-cpu", {}, {})
    model = resolve_model(settings.model.source, settings.model.cache_dir)
    report = report_of(_AUDIT, model, resolve_drafter(settings.speculation.drafter))
    check(report)
    assert report["accepted"] > 0


def test_a_target_with_sliding_windows_and_without_vllms_interface_for_hidden_states(tmp_path: Path) -> None:
    """Gemma 3: hooks take its hidden states, and the drafter's pages are those of its few layers that see it all."""
    write_gemma(tmp_path / "gemma")
    drafter = shift_config(
        hidden_size=_HIDDEN,
        intermediate_size=96,
        num_heads=2,
        num_kv_heads=1,
        head_dim=_HEAD_DIM,
        vocab_size=_VOCAB,
        rms_norm_eps=1e-6,
        qk_norm=True,
        target_layer_ids=(0, 2, 4),
        block_size=5,
        mask_token_id=4,
        markov_rank=64,
        draft_vocab_size=8192,
    )
    save_drafter(random_drafter(drafter), tmp_path / "drafter", torch.float32)
    check(report_of(_AUDIT, tmp_path / "gemma", tmp_path / "drafter"))


def write_gemma(folder: Path) -> None:
    """A random target: two of six layers see all of the context, the others 48 tokens."""
    config = Gemma3TextConfig(
        vocab_size=_VOCAB,
        hidden_size=_HIDDEN,
        intermediate_size=96,
        num_hidden_layers=_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=_HEAD_DIM,
        query_pre_attn_scalar=_HEAD_DIM,
        max_position_embeddings=512,
        sliding_window=48,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
