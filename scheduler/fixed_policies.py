"""Draft lengths by rules that know neither acceptance probabilities nor cost: what to compare with; pure."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduler.policy import Admission, ComingStep, LearningNothing, Offer


class FixedLength(LearningNothing):
    """Always as many tokens of the source that promises more; ``FixedLength(0)`` is decoding without drafts.

    Args:
        length: draft tokens.

    Raises:
        ValueError: ``length`` is negative.
    """

    def __init__(self, length: int):
        if length < 0:
            raise ValueError(f"a fixed draft length must not be negative, but is {length}")
        self._length = length

    def plan(self, coming: ComingStep) -> list[int]:
        """See ``DraftPolicy``."""
        return [self._length] * len(coming.request_ids)

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        """See ``DraftPolicy``."""
        return [_first(self._length, coming, row, offer) for row, offer in enumerate(offers)]


class BatchTable(LearningNothing):
    """One length for all requests of a step, by how many they are, as in vLLM's table of speculative tokens.

    Args:
        lengths: draft tokens by the number of requests from which on they are verified, up to the next entry.

    Raises:
        ValueError: there is no entry for one request, or a number is negative.
    """

    def __init__(self, lengths: Mapping[int, int]):
        self._starts = sorted(lengths)
        self._lengths = [lengths[start] for start in self._starts]
        if not lengths or self._starts[0] != 1 or min(self._lengths) < 0:
            raise ValueError(f"a table of draft lengths must start at 1 request and hold no negative, not {lengths}")

    def plan(self, coming: ComingStep) -> list[int]:
        """See ``DraftPolicy``."""
        requests = len(coming.request_ids)
        return [self._length(requests)] * requests

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        """See ``DraftPolicy``."""
        length = self._length(len(offers))
        return [_first(length, coming, row, offer) for row, offer in enumerate(offers)]

    def _length(self, requests: int) -> int:
        return self._lengths[max(bisect_right(self._starts, requests) - 1, 0)]


@dataclass(slots=True)
class _Averages:
    generated: float
    accepted: float


class AdaptiveDraftLength(LearningNothing):
    """The draft-length controller of DiffuSpec (arXiv 2510.02358), request by request.

    It keeps moving averages of a request's generated and accepted lengths. The next draft is as long as those before
    it were on average, and by ``growth`` longer if all of them was accepted on average. The lengths stay within
    ``least`` and ``most``, 20 and 30 in the paper. What is generated falls behind what was asked for where a draft
    ends early; apart from that the rule only grows.

    Args:
        least: shortest draft, and the first of each request; tokens.
        most: longest draft, tokens.
        growth: tokens.
        share: of the latest draft in the averages, above 0 and up to 1.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, least: int, most: int, growth: int, share: float = 0.5):
        if not 0 < least <= most or growth < 0 or not 0 < share <= 1:
            raise ValueError(
                "draft lengths must have 0 < least <= most, growth >= 0 and a share above 0 and up to 1, "
                f"not {least}, {most}, {growth} and {share}"
            )
        self._least, self._most, self._growth, self._share = least, most, growth, share
        self._averages: dict[str, _Averages] = {}

    def plan(self, coming: ComingStep) -> list[int]:
        """See ``DraftPolicy``."""
        return [self._length(request_id) for request_id in coming.request_ids]

    def admit(self, coming: ComingStep, offers: Sequence[Offer]) -> list[Admission]:
        """See ``DraftPolicy``."""
        return [
            _first(self._length(request_id), coming, row, offer)
            for row, (request_id, offer) in enumerate(zip(coming.request_ids, offers, strict=True))
        ]

    def _length(self, request_id: str) -> int:
        averages = self._averages.get(request_id)
        if averages is None:
            return self._least
        grown = self._growth if averages.accepted >= averages.generated else 0
        return min(max(int(averages.generated) + grown, self._least), self._most)

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        """See ``DraftPolicy``."""
        if not verified:
            return
        averages = self._averages.setdefault(request_id, _Averages(verified, accepted))
        averages.generated += self._share * (verified - averages.generated)
        averages.accepted += self._share * (accepted - averages.accepted)

    def finished(self, request_id: str) -> None:
        """See ``DraftPolicy``."""
        self._averages.pop(request_id, None)


def _first(length: int, coming: ComingStep, row: int, offer: Offer) -> Admission:
    """The first ``length`` tokens of the more promising source, as far as they exist and may be verified."""
    source = offer.expected
    survival = offer.survival[source]
    limit = coming.limit(row)
    tokens = min(length, len(survival), len(survival) if limit is None else limit)
    return Admission(tokens, source, survival[:tokens])
