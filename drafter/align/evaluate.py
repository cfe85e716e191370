"""Emitted tokens per verify step on recorded answers, counted as the server would count them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from drafter.align.batches import anchor_range, make_batch, run_blocks
from drafter.align.corpus import Answer
from drafter.head import DraftHead
from drafter.model import BlockDrafter


@dataclass(slots=True)
class AcceptanceReport:
    """Verify steps and what they emitted; index ``k`` of the lists is draft slot ``k``."""

    steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    emitted: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    accepted_by_slot: list[int] = field(default_factory=list)

    def emitted_per_step(self, category: str | None = None) -> float:
        """Emitted tokens per verify step of one category, or of all."""
        if category is not None:
            return self.emitted[category] / max(self.steps[category], 1)
        return sum(self.emitted.values()) / max(sum(self.steps.values()), 1)

    def summary(self) -> dict[str, float]:
        """``all`` and each category, rounded to three decimals."""
        rows = {category: self.emitted_per_step(category) for category in sorted(self.steps)}
        return {name: round(value, 3) for name, value in {"all": self.emitted_per_step(), **rows}.items()}


@torch.inference_mode()
def evaluate(
    model: BlockDrafter, head: DraftHead, embedding: torch.Tensor, answers: Sequence[Answer]
) -> AcceptanceReport:
    """Draft behind every answer token and walk each answer as greedy verification would.

    The answers must be the target's greedy ones: then the token that the target emits behind a draft is known
    without running it.
    """
    report = AcceptanceReport(accepted_by_slot=[0] * model.config.num_draft_tokens)
    for answer in answers:
        anchors = torch.tensor(list(anchor_range(answer)))
        if not len(anchors):
            continue
        batch = make_batch([answer], [anchors], model.config)
        tokens, _ = head.walk(run_blocks(model, batch, embedding), batch.anchor_tokens)
        accepted = (tokens == batch.labels).int().cumprod(dim=1).sum(dim=1).tolist()
        _walk(answer.id.category, accepted, report)
    return report


def _walk(category: str, accepted: list[int], report: AcceptanceReport) -> None:
    """Step from anchor to anchor: a step emits what it accepted and one token more, within the answer."""
    position = 0
    while position < len(accepted):
        emitted = min(accepted[position] + 1, len(accepted) - position)
        report.steps[category] += 1
        report.emitted[category] += emitted
        for slot in range(emitted - 1):
            report.accepted_by_slot[slot] += 1
        position += emitted
