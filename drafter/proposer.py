"""Proposing draft tokens while serving: context K/V after every target pass, then one block for all requests."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cuda_ext import ops
from drafter.checkpoint import Drafter, check_fits, load_drafter
from drafter.serving import BlockContext, BlockRows, ServingDrafter
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
        self._drafter, self._config, self._source = drafter, drafter.model.config, source
        self._max_draft_tokens = min(max_draft_tokens, self._config.num_draft_tokens)
        self._counters = DrafterCounters()

    @classmethod
    def from_checkpoint(cls, folder: Path, max_draft_tokens: int) -> "BlockDiffusionProposer":
        """Load a checkpoint folder; raises ``DrafterCheckpointError`` when that is not possible."""
        return cls(load_drafter(folder), max_draft_tokens, str(folder))

    @property
    def hidden_state_layers(self) -> tuple[int, ...]:
        return self._config.hidden_state_layers

    @property
    def max_draft_tokens(self) -> int:
        return self._max_draft_tokens

    def cache_bytes_per_token(self) -> int:
        return self._config.cache_bytes_per_token

    def attach(self, target: TargetModel, cache: PagedCacheSpec) -> None:
        """Check that the drafter fits, share the target's embedding and head, allocate the pages."""
        check_fits(self._drafter.model.config, target.shape, self._source)
        self._serving = ServingDrafter(self._drafter, target, cache)

    def page_tensors(self) -> list[torch.Tensor]:
        return self._serving.pages

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
        hidden_states = torch.cat(list(forward.hidden_states), dim=-1).to(torch.float32)
        features = self._serving.context_features(hidden_states)
        self._serving.write_context(features, forward.positions, forward.slot_mapping)
        self._counters.context_tokens += len(features)
        return features

    def _denoise(
        self, forward: TargetForward, features: torch.Tensor, rows: list[int], wanted: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config, device = self._config, features.device
        slots = wanted + config.block_size - config.num_draft_tokens if config.causal else config.block_size
        index = torch.tensor(rows, device=device)
        lengths = forward.context_lens[index]
        first_rows = forward.row_starts[index]
        last_rows = first_rows + lengths - 1 - forward.positions[first_rows]
        anchors = torch.tensor([forward.sampled[r][-1] for r in rows], device=device)
        order, _, positions, visible = ops.partition_block(
            torch.ones(len(rows), slots, dtype=torch.int32, device=device), lengths
        )
        if not config.causal:
            visible = torch.full_like(visible, slots)
        tokens = torch.full((len(rows), slots), config.mask_token_id, device=device)
        tokens[:, 0] = anchors
        inputs = self._serving.block_inputs(tokens, order, features[last_rows])
        context = BlockContext(forward.block_table[index], lengths.to(torch.int32))
        cache = self._serving.block_cache(len(rows), slots)
        hidden = self._serving.run(inputs, BlockRows(positions, order, visible), context, cache)
        first = slots - wanted if config.causal else slots - config.num_draft_tokens
        return self._serving.head.walk(hidden[:, first : first + wanted], anchors)
