"""A proposer that proposes nothing and writes down what the target computes, while it serves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from drafter.align.corpus import Answer, AnswerId, ShardWriter
from drafter.align.loops import loop_start
from drafter.types import Drafts, PagedCacheSpec, TargetForward, TargetModel


@dataclass(slots=True)
class _OpenAnswer:
    prompt_len: int
    token_ids: list[int] = field(default_factory=list)
    last_sampled: list[int] = field(default_factory=list)
    rows: list[list[torch.Tensor]] = field(default_factory=list)


class FeatureRecorder:
    """Records every request whose id is an ``AnswerId`` into corpus shards; others pass by.

    It needs an engine without prefix caching (a cached prompt is never run, so it has no hidden states) and
    starts a request afresh when a preemption makes the engine recompute it from position 0.

    Args:
        folder: corpus folder, made if absent.
        layers: hidden states to record.
    """

    def __init__(self, folder: Path, layers: tuple[int, ...]):
        self._layers = layers
        self._writer = ShardWriter(folder)
        self._open: dict[str, _OpenAnswer] = {}
        self._answers = self._loops = 0

    @property
    def hidden_state_layers(self) -> tuple[int, ...]:
        return self._layers

    @property
    def max_draft_tokens(self) -> int:
        return 1

    def cache_bytes_per_token(self) -> int:
        return 0

    def attach(self, target: TargetModel, cache: PagedCacheSpec) -> None:
        """Check the layers against the target.

        Raises:
            ValueError: a layer that the target does not have.
        """
        shape = target.shape
        if bad := [layer for layer in self._layers if not 0 <= layer <= shape.num_layers]:
            raise ValueError(f"hidden-state layers {bad} do not exist in {shape.path}: 0 to {shape.num_layers} do")

    def page_tensors(self) -> list[torch.Tensor]:
        return []

    def settle(self) -> None:
        """Nothing waits."""

    def propose(self, forward: TargetForward) -> Drafts:
        """Append this pass's rows to their requests and close the requests that ended."""
        self._close(forward.finished)
        starts = forward.row_starts.tolist()
        for r, request_id in enumerate(forward.request_ids):
            if not AnswerId.is_one(request_id):
                continue
            rows = slice(starts[r], starts[r + 1])
            if int(forward.positions[rows.start]) == 0 or request_id not in self._open:
                self._open[request_id] = _OpenAnswer(forward.prompt_lens[r])
            answer = self._open[request_id]
            answer.token_ids.extend(forward.token_ids[rows].tolist())
            answer.rows.append([layer[rows].to(torch.float16, copy=True) for layer in forward.hidden_states])
            answer.last_sampled = list(forward.sampled[r])
        return Drafts.none(len(forward.request_ids))

    def command(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """``flush`` closes every request and writes the last shard.

        It answers with the number of answers written, and how many of them lost a loop at their end.
        """
        if name != "flush":
            raise ValueError(f"unknown command {name!r}: the recorder knows 'flush'")
        self._close(tuple(self._open))
        self._writer.flush()
        return {"answers": self._answers, "loops": self._loops}

    def _close(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            answer = self._open.pop(request_id, None)
            if answer is None or not answer.last_sampled:
                continue
            self._writer.add(self._closed(AnswerId.parse(request_id), answer))
            self._answers += 1

    def _closed(self, answer_id: AnswerId, answer: _OpenAnswer) -> Answer:
        """A finished answer, without the loop that it may end in."""
        token_ids = answer.token_ids + answer.last_sampled
        start = loop_start(token_ids[answer.prompt_len :])
        if start is not None:
            token_ids = token_ids[: answer.prompt_len + start]
            self._loops += 1
        hidden = {}
        for i, layer in enumerate(self._layers):
            rows = torch.cat([step[i] for step in answer.rows])[: len(token_ids) - 1]
            hidden[layer] = torch.cat([rows, rows.new_zeros(len(token_ids) - len(rows), rows.shape[1])])
        return Answer(answer_id, answer.prompt_len, torch.tensor(token_ids), hidden)
