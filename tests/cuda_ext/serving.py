"""Requests that one decoder layer serves step by step, as an engine would; for tests of equal bits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from tests.cuda_ext.layers import LayerShape, Pages, angles
from tests.cuda_ext.oracle import rotary_table

LONGEST = 600


@dataclass(frozen=True)
class Work:
    """Rows of one request in one step.

    Attributes:
        request: which one, by number.
        count: its next tokens.
        rejected: rows behind those that carry something else than the request's tokens, as rejected draft tokens do.
    """

    request: int
    count: int
    rejected: int = 0


@dataclass(frozen=True)
class Served:
    """All there is of one request: ``rows`` ``[tokens, 2 * hidden]`` and ``kv`` ``[tokens, 2, kv_heads, head_dim]``."""

    rows: torch.Tensor
    kv: torch.Tensor

    def equals(self, other: "Served") -> bool:
        """Whether the tokens that both have are the same to the bit."""
        count = min(len(self.rows), len(other.rows))
        pairs = ((self.rows, other.rows), (self.kv, other.kv))
        return count > 0 and all(torch.equal(one[:count], two[:count]) for one, two in pairs)


class Serving:
    """One layer, its pages and the requests in them.

    Args:
        lengths: tokens of each request.
        layout: seed of the pages' order.
        texts: which tokens each request has; by default those of its own number.
    """

    def __init__(
        self,
        operations: ModuleType,
        shape: LayerShape,
        lengths: Sequence[int],
        page_size: int = 32,
        dtype: torch.dtype = torch.float32,
        layout: int = 0,
        texts: Sequence[int] | None = None,
    ):
        self._operations, self._shape, self.lengths = operations, shape, list(lengths)
        self.texts = list(range(len(lengths)) if texts is None else texts)
        self.pages = Pages(shape, [length + 8 for length in lengths], page_size, dtype, layout)
        self._done = [0] * len(lengths)
        self._rows = [torch.full((length, 2 * shape.hidden), torch.nan) for length in lengths]
        self._table = rotary_table(angles(shape.head_dim))

    def step(self, *work: Work, padding: int = 0) -> None:
        """Run the layer once, for the requests in this order."""
        shape, pages = self._shape, self.pages
        inputs, positions, slots, starts, lengths = [], [], [], [0], []
        for item in work:
            first, last = self._done[item.request], self._done[item.request] + item.count
            inputs += [tokens(shape, self.texts[item.request])[first:last], tokens(shape, -1)[: item.rejected]]
            positions.append(torch.arange(first, last + item.rejected))
            slots.append(pages.slots(item.request, first, last + item.rejected))
            starts.append(starts[-1] + item.count + item.rejected)
            lengths.append(last + item.rejected)
        inputs.append(tokens(shape, -2)[:padding])
        hidden, residual = torch.cat(inputs).chunk(2, dim=1)
        output, stream = self._operations.decoder_layer(
            hidden.contiguous(),
            residual.contiguous(),
            torch.cat([*positions, torch.zeros(padding, dtype=torch.int64)]),
            *pages.caches(),
            torch.cat([*slots, torch.full((padding,), -1)]),
            pages.tables[[item.request for item in work]],
            torch.tensor(lengths, dtype=torch.int32),
            torch.tensor(starts, dtype=torch.int32),
            self._table,
            shape.scale,
            *shape.weights.arguments,
        )
        rows = torch.cat([output, stream], dim=1)
        for item, start in zip(work, starts, strict=False):
            first, last = self._done[item.request], self._done[item.request] + item.count
            self._rows[item.request][first:last] = rows[start : start + item.count]
            self._done[item.request] = last

    def share(self, source: int, target: int, count: int) -> None:
        """Let a request begin with ``count`` tokens of another, in the same pages, as a prefix cache does."""
        pages = count // self.pages.page_size
        assert pages * self.pages.page_size == count <= self._done[source]
        self.pages.tables[target, :pages] = self.pages.tables[source, :pages]
        self._rows[target][:count] = self._rows[source][:count]
        self._done[target] = count

    def left(self, request: int) -> int:
        """Tokens of a request that were not run yet."""
        return self.lengths[request] - self._done[request]

    def served(self, request: int) -> Served:
        """What the steps so far made of a request."""
        done = self._done[request]
        kv = self.pages.read(self.pages.slots(request, 0, done))
        return Served(self._rows[request][:done], kv)


@dataclass(frozen=True)
class Plan:
    """How one request of ``serve`` is cut.

    Attributes:
        cuts: tokens of its steps, over and over until none is left.
        arrival: the step in which it starts.
        rejected: in each step.
    """

    length: int
    cuts: tuple[int, ...]
    arrival: int = 0
    rejected: int = 0

    def work(self, request: int) -> Iterator[Work]:
        """Its rows, step by step."""
        done, step = 0, 0
        while done < self.length:
            count = min(self.cuts[step % len(self.cuts)], self.length - done)
            yield Work(request, count, self.rejected)
            done, step = done + count, step + 1


def serve(serving: Serving, plans: Sequence[Plan], newest_first: bool = False, padding: int = 0) -> None:
    """Run requests to their end, each by its plan, together wherever their steps coincide."""
    waiting = dict(enumerate(plans))
    running: dict[int, Iterator[Work]] = {}
    step = 0
    while waiting or running:
        for request in [request for request, plan in waiting.items() if plan.arrival <= step]:
            running[request] = waiting.pop(request).work(request)
        work = [item for items in running.values() if (item := next(items, None))]
        running = {item.request: running[item.request] for item in work}
        if work:
            serving.step(*(reversed(work) if newest_first else work), padding=padding)
        step += 1


def alone(operations: ModuleType, shape: LayerShape, text: int, dtype: torch.dtype = torch.float32) -> Served:
    """The longest request of a text, all of its tokens in one step and no other request."""
    return _alone(operations, torch.ops.slipstream.cpu_isa(), shape, text, dtype)


@lru_cache(maxsize=256)
def _alone(operations: ModuleType, isa: str, shape: LayerShape, text: int, dtype: torch.dtype) -> Served:
    del isa  # part of the key
    serving = Serving(operations, shape, [LONGEST], dtype=dtype, texts=[text])
    serving.step(Work(0, LONGEST))
    return serving.served(0)


@lru_cache(maxsize=64)
def tokens(shape: LayerShape, text: int) -> torch.Tensor:
    """What tokens are to the layer: hidden state and residual side by side ``[LONGEST, 2 * hidden]``."""
    return torch.randn(LONGEST, 2 * shape.hidden, generator=torch.Generator().manual_seed(1000 + text))
