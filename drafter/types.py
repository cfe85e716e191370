"""What passes between the target's forward pass and whatever proposes draft tokens.

These types are the drafter's whole view of the engine: plain tensors and ids, nothing of vLLM. One target
forward pass produces one ``TargetForward``; the proposer answers with one ``Drafts``.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class PagedCacheSpec:
    """KV pages that the drafter's cache shares with the target's full-attention group, and where they live."""

    num_pages: int
    page_size: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class TargetShape:
    """What a drafter must agree with before it can read a target.

    Attributes:
        hidden_size: width of the hidden states.
        vocab_size: rows of the embedding and of the output head.
        num_layers: decoder layers.
        path: folder or name the target was loaded from, for messages.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    path: str


@dataclass(frozen=True, slots=True)
class TargetModel:
    """The parts of the target that a drafter shares but never changes.

    Attributes:
        shape: its sizes.
        embedding: ``[vocab, hidden]`` float tensor.
        output_head: ``[vocab, hidden]`` float tensor; the same storage as ``embedding`` when they are tied.
    """

    shape: TargetShape
    embedding: torch.Tensor
    output_head: torch.Tensor


@dataclass(frozen=True, slots=True)
class RandomSampling:
    """How the target draws a request's tokens: the arg-max of ``log p / temperature`` plus the seed's noise.

    Attributes:
        seed: signed 64-bit; with a token's position and id it gives the noise (``drafter.noise``).
        temperature: above 0.
        top_k: only so many of the likeliest tokens can be drawn; 0 for all.
        top_p: only the likeliest tokens that reach this probability together can be drawn; above 0, at most 1.
    """

    seed: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class TargetForward:
    """One forward pass of the target over a batch, after its tokens were sampled.

    ``T`` rows are the tokens that were run, request by request; ``R`` is the number of requests.

    Attributes:
        request_ids: ``R`` ids.
        row_starts: ``[R + 1]`` int64, first row of each request and, last, ``T``.
        token_ids: ``[T]`` int64, the tokens that were run (draft tokens included).
        positions: ``[T]`` int64, their positions in the request.
        slot_mapping: ``[T]`` int64, page * page_size + offset of each row.
        block_table: ``[R, max_pages]`` int32, the pages of each request.
        hidden_states: per requested layer, ``[T, hidden]``.
        context_lens: ``[R]`` int64, tokens whose hidden states are final: rejected drafts do not count.
        sampled: tokens that the step emitted per request; empty while a prompt is still being read.
        draft_limits: the most draft tokens that can still be used per request.
        end_tokens: per request, the tokens that end its answer.
        private: per request, whether nothing of its text may show in the drafts of others.
        finished: requests that ended since the last pass.
        prompt_lens: ``R`` prompt lengths in tokens.
        sampling: per request, how its tokens are drawn; ``None`` where the target takes its most likely token.
    """

    request_ids: Sequence[str]
    row_starts: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    hidden_states: Sequence[torch.Tensor]
    context_lens: torch.Tensor
    sampled: Sequence[Sequence[int]]
    draft_limits: Sequence[int]
    end_tokens: Sequence[Set[int]]
    private: Sequence[bool]
    finished: Sequence[str]
    prompt_lens: Sequence[int]
    sampling: Sequence[RandomSampling | None]


@dataclass(frozen=True, slots=True)
class DraftPath:
    """One draft per request, picked from the distributions of a block.

    Attributes:
        tokens: ``[B, S]`` int64 token ids.
        probabilities: ``[B, S]`` float32, the probability of each token given those picked before it.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor

    @property
    def survival(self) -> torch.Tensor:
        """``[B, S]`` float32, the estimated probability that a token and all before it are accepted."""
        return self.probabilities.cumprod(dim=1)


class PathSearcher(Protocol):
    """Picks one draft per request from the draft head's logits."""

    def __call__(self, logits: torch.Tensor, anchors: torch.Tensor, fixed: torch.Tensor | None) -> DraftPath:
        """Pick a token for every draft slot.

        Args:
            logits: ``[B, S, draft_vocab]`` float32, by logical order.
            anchors: ``[B]`` int64, the token before each draft.
            fixed: ``[B, S]`` int64 token ids that the draft must hold, -1 where it is free; ``None`` fixes nothing.
        """
        ...


@dataclass(frozen=True, slots=True)
class Drafts:
    """Draft tokens per request, in the order of ``TargetForward.request_ids``.

    ``survival[r][k]`` estimates the probability that tokens ``0..k`` of request ``r`` are all accepted. After one pass
    over a block it rests on these tokens alone; refinement passes let later tokens have their say. ``late_seconds``
    went into what earlier steps had put off, so that drafting behind every step would not take them.
    """

    token_ids: list[list[int]] = field(default_factory=list)
    survival: list[list[float]] = field(default_factory=list)
    late_seconds: float = 0.0

    @classmethod
    def none(cls, num_requests: int) -> "Drafts":
        """No draft tokens for any of ``num_requests`` requests."""
        return cls([[] for _ in range(num_requests)], [[] for _ in range(num_requests)])


class Proposer(Protocol):
    """Anything that turns a target forward pass into draft tokens."""

    @property
    def hidden_state_layers(self) -> tuple[int, ...]:
        """Hidden states to hand over: ``i`` is the output of decoder layer ``i - 1``, 0 the embedding."""
        ...

    @property
    def max_draft_tokens(self) -> int:
        """The most tokens that ``propose`` returns for one request."""
        ...

    def cache_bytes_per_token(self) -> int:
        """Bytes of paged cache that one token of context costs the drafter."""
        ...

    def attach(self, target: TargetModel, cache: PagedCacheSpec) -> None:
        """Bind to the loaded target and allocate the paged cache; called once, before the first ``propose``."""
        ...

    def page_tensors(self) -> list[torch.Tensor]:
        """The paged cache, each tensor ``[num_pages, ...]``: the engine copies pages in them as in its own."""
        ...

    def propose(self, forward: TargetForward) -> Drafts:
        """Take in what the target computed and return the next drafts."""
        ...

    def settle(self) -> object:
        """Write to the pages whatever of the passes has not been written yet: pages are about to be copied."""
        ...

    def command(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer a management call (counters, flushing); raises ``ValueError`` for an unknown ``name``."""
        ...
