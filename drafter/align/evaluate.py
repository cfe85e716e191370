"""Emitted tokens per verify step on recorded answers, counted as the server would count them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from drafter.align.batches import anchor_range, make_batch, run_blocks
from drafter.align.corpus import Answer
from drafter.checkpoint import Drafter
from drafter.coupled import Draws
from drafter.denoise import BlockStarts, denoise
from drafter.head import DraftHead
from drafter.layers import BlockContext
from drafter.model import BlockDrafter
from drafter.options import ProposalOptions
from drafter.path import BeamSearch
from drafter.search import DRAWN
from drafter.serving import ServingDrafter
from drafter.thresholds import FixedThreshold, Thresholds
from drafter.types import PagedCacheSpec, RandomSampling, TargetModel

_PAGE_SIZE = 16


@dataclass(slots=True)
class AcceptanceReport:
    """Verify steps, the passes over the block of each, and what they emitted.

    The dictionaries are by category; index ``k`` of the list is draft slot ``k``.
    """

    steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    emitted: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    passes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
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
    """Draft behind every answer token and walk each answer as verification would.

    The token that the target emits behind a draft is known without running it: of a greedy answer it is the next one,
    and of a sampled one too, provided that it was drawn with the noise of its id's seed. Sampled answers are drafted
    with that noise, as in the server, but for its n-gram model.
    """
    report = AcceptanceReport(accepted_by_slot=[0] * model.config.num_draft_tokens)
    drawn = None if all(answer.id.temperature == 0 for answer in answers) else BeamSearch(head, options=DRAWN)
    for answer in answers:
        anchors = torch.tensor(list(anchor_range(answer)))
        if not len(anchors):
            continue
        batch = make_batch([answer], [anchors], model.config)
        logits = head.logits(run_blocks(model, batch, embedding))
        if answer.id.temperature == 0 or drawn is None:
            path = head.walk(logits, batch.anchor_tokens)
        else:
            path = drawn(logits, batch.anchor_tokens, None, draws=_draws(answer, anchors))
        accepted = (path.tokens == batch.labels).int().cumprod(dim=1).sum(dim=1)
        _walk(answer.id.category, accepted.tolist(), [1] * len(anchors), report)
    return report


@torch.inference_mode()
def evaluate_serving(
    drafter: Drafter,
    target: TargetModel,
    answers: Sequence[Answer],
    options: ProposalOptions,
    thresholds: Thresholds | None = None,
) -> AcceptanceReport:
    """``evaluate`` with the network that serves, refinement passes included.

    Args:
        answers: the target's greedy ones.
        options: as in the server; ``calibrated_threshold`` is not looked at.
        thresholds: instead of the fixed one of the options; requests are known by the answers' ids.
    """
    pages = -(-max((len(answer.token_ids) for answer in answers), default=1) // _PAGE_SIZE)
    serving = ServingDrafter(drafter, target, PagedCacheSpec(pages, _PAGE_SIZE))
    wanted = min(options.max_draft_tokens, drafter.model.config.num_draft_tokens)
    if thresholds is None:
        thresholds = FixedThreshold(options.observe_threshold)
    report = AcceptanceReport(accepted_by_slot=[0] * wanted)
    for answer in answers:
        anchors = torch.tensor(list(anchor_range(answer)))
        if not len(anchors):
            continue
        batch = make_batch([answer], [anchors], drafter.model.config)
        features = serving.context_features(batch.hidden_states)
        serving.write_context(features, batch.positions, batch.positions)
        # Every anchor is a request of its own whose context is the answer's beginning, in the same pages.
        table = torch.arange(pages, dtype=torch.int32).expand(len(anchors), -1).contiguous()
        starts = BlockStarts(
            request_ids=[str(answer.id)] * len(anchors),
            anchors=batch.anchor_tokens,
            last_features=features[batch.anchors],
            context=BlockContext(table, anchors.to(torch.int32)),
        )
        result = denoise(serving, starts, wanted, serving.head.walk, thresholds, options.max_passes)
        accepted = (result.path.tokens == batch.labels[:, :wanted]).int().cumprod(dim=1).sum(dim=1)
        _walk(answer.id.category, accepted.tolist(), result.passes.tolist(), report)
    return report


def _draws(answer: Answer, anchors: torch.Tensor) -> Draws:
    sampling = [RandomSampling(answer.id.seed, answer.id.temperature)] * len(anchors)
    return Draws.of(sampling, (anchors + 1).tolist())


def _walk(category: str, accepted: list[int], passes: list[int], report: AcceptanceReport) -> None:
    """Step from anchor to anchor: a step emits what it accepted and one token more, within the answer."""
    position = 0
    while position < len(accepted):
        emitted = min(accepted[position] + 1, len(accepted) - position)
        report.steps[category] += 1
        report.emitted[category] += emitted
        report.passes[category] += passes[position]
        for slot in range(emitted - 1):
            report.accepted_by_slot[slot] += 1
        position += emitted
