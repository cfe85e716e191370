"""A target and its paged cache as a proposer sees them: pages handed out, slots mapped, passes made up."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from drafter.types import Drafts, PagedCacheSpec, Proposer, RandomSampling, TargetForward, TargetModel
from tests.drafter.tiny import HIDDEN, LAYERS, VOCAB, random_target


@dataclass(frozen=True)
class Work:
    """What one pass does for one request.

    Attributes:
        run: tokens of the request that are run; ``None`` for all that were not yet.
        drafts: draft tokens that are run behind them.
        emitted: tokens that the target emits: the accepted drafts and one more; none while a prompt is read.
        limit: draft tokens that can still be used.
    """

    run: int | None = None
    drafts: Sequence[int] = ()
    emitted: Sequence[int] = ()
    limit: int = 99


@dataclass
class RequestState:
    """A request's tokens so far, how many of them have final hidden states, and its pages."""

    prompt_len: int
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)


class SimulatedEngine:
    """Drives a proposer through target passes.

    Every unwritten row of the cache is NaN, so that reading what nobody wrote shows. Hidden states depend on the
    whole prefix, as a real target's do.
    """

    def __init__(self, proposer: Proposer, target: TargetModel | None = None, page_size: int = 4, num_pages: int = 24):
        self.proposer, self.page_size = proposer, page_size
        self.target = target or random_target()
        self.requests: dict[str, RequestState] = {}
        self.end_tokens: frozenset[int] = frozenset()
        self.private: set[str] = set()
        self.sampling: dict[str, RandomSampling] = {}
        self._finished: list[str] = []
        self._free = list(range(num_pages))
        generator = torch.Generator().manual_seed(11)
        self._states = torch.randn(LAYERS + 1, VOCAB, HIDDEN, generator=generator)
        proposer.attach(self.target, PagedCacheSpec(num_pages, page_size))
        for pages in proposer.page_tensors():
            pages.fill_(math.nan)

    def hidden_states(self, tokens: Sequence[int]) -> dict[int, torch.Tensor]:
        """The target's hidden states ``[tokens, hidden]`` by index, exact in float16."""
        states = self._states[:, torch.tensor(tokens)].cumsum(dim=1).sin()
        return {i: states[i].half().float() for i in range(LAYERS + 1)}

    def add(self, request_id: str, prompt: Sequence[int], cached_from: str | None = None, cached: int = 0) -> None:
        """Start a request; its first ``cached`` tokens lie in the pages of another one."""
        state = RequestState(len(prompt), list(prompt), cached)
        if cached_from is not None:
            assert cached % self.page_size == 0
            state.pages = self.requests[cached_from].pages[: cached // self.page_size]
        self.requests[request_id] = state

    def end(self, request_id: str, finished: bool = True) -> None:
        """Give a request's pages back; the next request gets the very same ones."""
        state = self.requests.pop(request_id)
        self._free[:0] = state.pages
        if finished:
            self._finished.append(request_id)

    def step(self, work: Mapping[str, Work]) -> dict[str, tuple[list[int], list[float]]]:
        """One target pass over the requests of ``work``; returns drafts and their survival by request."""
        drafts: Drafts = self.proposer.propose(self.forward(work))
        assert len(drafts.token_ids) == len(drafts.survival) == len(work)
        return dict(zip(work, zip(drafts.token_ids, drafts.survival, strict=True), strict=True))

    def forward(self, work: Mapping[str, Work]) -> TargetForward:
        """Advance the requests and describe the pass."""
        starts, tokens = [0], list[int]()
        positions, hidden, tables = list[int](), list[dict[int, torch.Tensor]](), list[list[int]]()
        for request_id, item in work.items():
            state = self.requests[request_id]
            known = state.tokens[: len(state.tokens) if item.run is None else state.computed + item.run]
            ran = [*known, *item.drafts]
            while len(state.pages) * self.page_size < len(ran):
                state.pages.append(self._free.pop(0))
            rows = range(state.computed, len(ran))
            starts.append(starts[-1] + len(rows))
            tokens.extend(ran[state.computed :])
            positions.extend(rows)
            hidden.append({i: h[state.computed :] for i, h in self.hidden_states(ran).items()})
            tables.append(list(state.pages))
            accepted = max(len(item.emitted) - 1, 0)
            assert list(item.drafts[:accepted]) == list(item.emitted[:accepted])
            state.computed = len(known) + (accepted if item.emitted else len(item.drafts))
            state.tokens.extend(item.emitted)
        width = max(map(len, tables)) + 1
        padded = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)
        owners = torch.tensor([r for r in range(len(work)) for _ in range(starts[r], starts[r + 1])])
        where = torch.tensor(positions)
        states = [self.requests[request_id] for request_id in work]
        finished, self._finished = self._finished, []
        return TargetForward(
            request_ids=list(work),
            row_starts=torch.tensor(starts),
            token_ids=torch.tensor(tokens),
            positions=where,
            slot_mapping=padded[owners, where // self.page_size].long() * self.page_size + where % self.page_size,
            block_table=padded,
            hidden_states=[torch.cat([h[i] for h in hidden]) for i in self.proposer.hidden_state_layers],
            context_lens=torch.tensor([state.computed for state in states]),
            sampled=[list(item.emitted) for item in work.values()],
            draft_limits=[item.limit for item in work.values()],
            end_tokens=[self.end_tokens] * len(work),
            private=[request_id in self.private for request_id in work],
            finished=finished,
            prompt_lens=[state.prompt_len for state in states],
            sampling=[self.sampling.get(request_id) for request_id in work],
        )
