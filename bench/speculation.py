"""Counters of speculative decoding, read from a server before and after each measured load."""

import math
from dataclasses import dataclass
from typing import Any

import httpx

__all__ = ["SpeculationCounters", "read_counters"]


@dataclass(frozen=True, slots=True)
class SpeculationCounters:
    """Totals since a server started, or what one load added to them.

    Attributes:
        verify_steps: forward passes of the target that checked a draft, counted for each request in them.
        emitted_tokens: tokens that came out of these passes.
        drafted_tokens, verified_tokens, accepted_tokens: proposed by the drafter, checked by the target, found right.
    """

    verify_steps: int = 0
    emitted_tokens: int = 0
    drafted_tokens: int = 0
    verified_tokens: int = 0
    accepted_tokens: int = 0

    def __add__(self, other: "SpeculationCounters") -> "SpeculationCounters":
        return SpeculationCounters(
            self.verify_steps + other.verify_steps,
            self.emitted_tokens + other.emitted_tokens,
            self.drafted_tokens + other.drafted_tokens,
            self.verified_tokens + other.verified_tokens,
            self.accepted_tokens + other.accepted_tokens,
        )

    def since(self, before: "SpeculationCounters") -> "SpeculationCounters":
        """What was added after ``before`` was read."""
        return SpeculationCounters(
            self.verify_steps - before.verify_steps,
            self.emitted_tokens - before.emitted_tokens,
            self.drafted_tokens - before.drafted_tokens,
            self.verified_tokens - before.verified_tokens,
            self.accepted_tokens - before.accepted_tokens,
        )

    @property
    def emitted_per_verify_step(self) -> float | None:
        """Tokens that one checking pass brought a request on average; ``None`` where nothing was checked."""
        return self.emitted_tokens / self.verify_steps if self.verify_steps else None


def read_counters(client: httpx.Client) -> SpeculationCounters | None:
    """The counters of the server behind ``client``.

    Our servers are asked through ``/v1/speculation``, others through vLLM's Prometheus counters (which count drafts
    and accepted tokens; every draft emits its accepted tokens and one more, and is verified as a whole).

    Returns:
        ``None`` where the server has neither.
    """
    return _from_json(client) or _from_metrics(client)


def _from_json(client: httpx.Client) -> SpeculationCounters | None:
    try:
        response = client.get("/v1/speculation")
        total = response.json()["since_start"] if response.is_success else None
        return SpeculationCounters(**{name: int(total[name]) for name in _NAMES}) if total else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


_NAMES = ("verify_steps", "emitted_tokens", "drafted_tokens", "verified_tokens", "accepted_tokens")


def _from_metrics(client: httpx.Client) -> SpeculationCounters | None:
    try:
        response = client.get("/metrics")
    except httpx.HTTPError:
        return None
    totals = _metric_totals(response.text) if response.is_success else {}
    steps = totals.get("vllm:spec_decode_num_drafts_total")
    accepted = totals.get("vllm:spec_decode_num_accepted_tokens_total")
    if steps is None or accepted is None:
        return None
    drafted = totals.get("vllm:spec_decode_num_draft_tokens_total", 0)
    return SpeculationCounters(steps, steps + accepted, drafted, drafted, accepted)


def _metric_totals(text: str) -> dict[str, int]:
    """Each metric of a Prometheus exposition, summed over its labels (the engines of one server)."""
    totals: dict[str, Any] = {}
    for line in text.splitlines():
        name, _, rest = line.partition("{" if "{" in line else " ")
        value = rest.rpartition("}")[2].split()
        if not line.startswith("#") and value:
            totals[name] = totals.get(name, 0.0) + float(value[0])
    return {name: int(total) for name, total in totals.items() if math.isfinite(total)}
