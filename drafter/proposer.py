"""Proposing draft tokens while serving: context K/V after every target pass, then one block for all requests."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cuda_ext.reference import block_attention, write_pages
from drafter.checkpoint import Drafter, check_fits, load_drafter
from drafter.head import DraftHead
from drafter.types import Drafts, PagedCacheSpec, TargetForward, TargetModel


@dataclass(slots=True)
class DrafterCounters:
    """What the drafter did since start; all grow only."""

    context_tokens: int = 0
    blocks: int = 0
    draft_tokens: int = 0


class BlockDiffusionProposer:
    """Implements ``drafter.types.Proposer`` with a ``BlockDrafter``.

    The paged cache holds the drafter's own keys and values for every token of context. It is indexed by the
    target's block table and slot mapping, so prefix-cache hits, preemption and chunked prefill of the target are
    right for the drafter too, provided that every target pass is written, whether tokens are drafted or not.
    """

    def __init__(self, drafter: Drafter, max_draft_tokens: int, source: str):
        self._drafter, self._model, self._source = drafter, drafter.model, source
        self._max_draft_tokens = min(max_draft_tokens, drafter.model.config.num_draft_tokens)
        self._pages: list[torch.Tensor] = []
        self._counters = DrafterCounters()

    @classmethod
    def from_checkpoint(cls, folder: Path, max_draft_tokens: int) -> "BlockDiffusionProposer":
        """Load a checkpoint folder; raises ``DrafterCheckpointError`` when that is not possible."""
        return cls(load_drafter(folder), max_draft_tokens, str(folder))

    @property
    def hidden_state_layers(self) -> tuple[int, ...]:
        return self._model.config.hidden_state_layers

    @property
    def max_draft_tokens(self) -> int:
        return self._max_draft_tokens

    def cache_bytes_per_token(self) -> int:
        return self._model.config.cache_bytes_per_token

    def attach(self, target: TargetModel, cache: PagedCacheSpec) -> None:
        """Check that the drafter fits, share the target's embedding and head, allocate the pages."""
        config = self._model.config
        check_fits(config, target.shape, self._source)
        self._embedding = target.embedding
        self._head: DraftHead = self._drafter.pack(target)
        shape = (cache.num_pages, 2, cache.page_size, config.num_kv_heads, config.head_dim)
        self._pages = [torch.zeros(shape, device=cache.device) for _ in range(config.num_layers)]

    def page_tensors(self) -> list[torch.Tensor]:
        return self._pages

    @torch.inference_mode()
    def propose(self, forward: TargetForward) -> Drafts:
        """Write the pass's context K/V, then draft for every request that can still use a draft token."""
        features = self._write_context(forward)
        rows = [r for r, tokens in enumerate(forward.sampled) if tokens and forward.draft_limits[r] > 0]
        drafts = Drafts.none(len(forward.request_ids))
        if not rows:
            return drafts
        wanted = min(self._max_draft_tokens, max(forward.draft_limits[r] for r in rows))
        tokens, survival = self._denoise(forward, features, rows, wanted)
        for r, row_tokens, row_survival in zip(rows, tokens.tolist(), survival.tolist(), strict=True):
            limit = min(wanted, forward.draft_limits[r])
            drafts.token_ids[r], drafts.survival[r] = row_tokens[:limit], row_survival[:limit]
        self._counters.blocks += len(rows)
        self._counters.draft_tokens += sum(map(len, drafts.token_ids))
        return drafts

    def command(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """``counters`` answers with ``DrafterCounters``."""
        if name == "counters":
            return asdict(self._counters)
        raise ValueError(f"unknown command {name!r}: the drafter knows 'counters'")

    def _write_context(self, forward: TargetForward) -> torch.Tensor:
        features = self._model.context_features(torch.cat(list(forward.hidden_states), dim=-1).to(torch.float32))
        context = self._model.context_kv(features, forward.positions)
        for pages, (key, value) in zip(self._pages, context, strict=True):
            write_pages(pages, key, value, forward.slot_mapping)
        self._counters.context_tokens += len(features)
        return features

    def _denoise(
        self, forward: TargetForward, features: torch.Tensor, rows: list[int], wanted: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._model.config
        slots = wanted + config.block_size - config.num_draft_tokens if config.causal else config.block_size
        device = features.device
        index = torch.tensor(rows, device=device)
        context_lens = forward.context_lens[index]
        first_rows = forward.row_starts[index]
        last_rows = first_rows + context_lens - 1 - forward.positions[first_rows]
        anchors = torch.tensor([forward.sampled[r][-1] for r in rows], device=device)
        offsets = torch.arange(slots, device=device)
        visible = (offsets + 1 if config.causal else torch.full_like(offsets, slots)).expand(len(rows), -1)
        block_table = forward.block_table[index]

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            scale = config.head_dim**-0.5
            return block_attention(query, key, value, self._pages[layer], block_table, context_lens, visible, scale)

        inputs = self._model.block_inputs(anchors, features[last_rows], self._embedding, slots)
        hidden = self._model(inputs, context_lens[:, None] + offsets, attend)
        return self._head.walk(hidden[:, :wanted], anchors)
