from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from drafter.align.batches import make_batch, run_blocks
from drafter.align.corpus import Answer, AnswerId
from drafter.align.evaluate import AcceptanceReport, evaluate, evaluate_serving
from drafter.checkpoint import Drafter
from drafter.config import DrafterConfig
from drafter.head import DraftHead
from drafter.noise import sample_rows
from drafter.options import ProposalOptions
from drafter.proposer import BlockDiffusionProposer
from drafter.types import DraftPath
from tests.drafter.simulated_engine import SimulatedEngine, Work
from tests.drafter.tiny import HIDDEN, VOCAB, dflash_config, random_drafter, random_target, shift_config

CONFIG = shift_config()
TARGET = random_target()


def answer(length: int, prompt_len: int = 2, category: str = "chat", seed: int = 0) -> Answer:
    generator = torch.Generator().manual_seed(seed)
    hidden = {i: torch.randn(length, HIDDEN, generator=generator).half() for i in (1, 3)}
    tokens = torch.randint(0, VOCAB, (length,), generator=generator)
    return Answer(AnswerId(category, seed, 0.0), prompt_len, tokens, hidden)


def simulate(tokens: list[int], prompt_len: int, drafts: dict[int, list[int]]) -> list[tuple[int, int]]:
    """Greedy decoding with ``drafts`` by anchor position: emitted and accepted tokens of every verify step."""
    steps, last = [], prompt_len
    while last < len(tokens) - 1:
        accepted = 0
        for draft in drafts[last]:
            if last + 1 + accepted >= len(tokens) or draft != tokens[last + 1 + accepted]:
                break
            accepted += 1
        emitted = min(accepted + 1, len(tokens) - 1 - last)
        steps.append((emitted, emitted - 1))
        last += emitted
    assert last == max(len(tokens) - 1, prompt_len)
    return steps


class Oracle:
    """A head that drafts the answer's own tokens, ``right[anchor]`` of them, then wrong ones."""

    def __init__(self, answers: list[Answer], right: list[list[int]]):
        self.calls = iter(zip(answers, right, strict=True))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def walk(self, logits: torch.Tensor, anchors: torch.Tensor) -> DraftPath:
        item, right = next(self.calls)
        count = logits.shape[1]
        rows = []
        for i, good in enumerate(right):
            position = item.prompt_len + i
            assert anchors[i] == item.token_ids[position]
            following = item.token_ids[position + 1 : position + 1 + count].tolist()
            following += [0] * (count - len(following))
            rows.append([token if k < good else (token + 1) % VOCAB for k, token in enumerate(following)])
        return DraftPath(torch.tensor(rows), torch.zeros(len(rows), count))


@pytest.mark.parametrize("seed", range(6))
def test_the_count_equals_a_naive_simulation(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    answers = [answer(9, 2, "chat", 3 * seed), answer(14, 5, "math", 3 * seed + 1), answer(5, 1, "chat", 3 * seed + 2)]
    right = [
        torch.randint(0, 5, (len(item.token_ids) - 1 - item.prompt_len,), generator=generator).tolist()
        for item in answers
    ]
    head, model = Oracle(answers, right), random_drafter(CONFIG).model
    report = evaluate(model, head, TARGET.embedding, answers)  # type: ignore[arg-type]
    steps: dict[str, list[tuple[int, int]]] = {"chat": [], "math": []}
    for item, good in zip(answers, right, strict=True):
        tokens = item.token_ids.tolist()
        drafts = {
            item.prompt_len + i: [
                tokens[p] if k < count and p < len(tokens) else -9
                for k, p in enumerate(range(item.prompt_len + i + 1, item.prompt_len + i + 5))
            ]
            for i, count in enumerate(good)
        }
        steps[item.id.category] += simulate(tokens, item.prompt_len, drafts)
    assert dict(report.steps) == {category: len(rows) for category, rows in steps.items()}
    assert dict(report.emitted) == {category: sum(emitted for emitted, _ in rows) for category, rows in steps.items()}
    every = [accepted for rows in steps.values() for _, accepted in rows]
    assert report.accepted_by_slot == [sum(accepted > slot for accepted in every) for slot in range(4)]


def test_the_drafters_own_drafts_are_walked() -> None:
    drafter, item = random_drafter(CONFIG), answer(12)
    head = drafter.head(TARGET)
    anchors = torch.arange(2, 11)
    with torch.inference_mode():
        hidden = run_blocks(drafter.model, make_batch([item], [anchors], CONFIG), TARGET.embedding)
        drafts = head.walk(head.logits(hidden), item.token_ids[anchors]).tokens
    # The answer follows the drafts for a while, so that some are accepted.
    item.token_ids[3:6] = drafts[0, :3]
    with torch.inference_mode():
        hidden = run_blocks(drafter.model, make_batch([item], [anchors], CONFIG), TARGET.embedding)
        drafts = head.walk(head.logits(hidden), item.token_ids[anchors]).tokens
    steps = simulate(item.token_ids.tolist(), 2, dict(zip(anchors.tolist(), drafts.tolist(), strict=True)))
    report = evaluate(drafter.model, head, TARGET.embedding, [item])
    assert report.steps["chat"] == len(steps) < 9
    assert report.emitted["chat"] == sum(emitted for emitted, _ in steps) == 9


def test_sampled_answers_are_drafted_with_their_noise() -> None:
    drafter, item = random_drafter(CONFIG), replace(answer(40), id=AnswerId("chat", 0, 3.0))
    head, seed = drafter.head(TARGET), item.id.seed
    with torch.inference_mode():
        for position in range(3, 40):  # the target's tokens are what the drafter's own distribution gives
            anchors = torch.tensor([position - 1])
            hidden = run_blocks(drafter.model, make_batch([item], [anchors], CONFIG), TARGET.embedding)
            logits = head.logits(hidden)[:, 0] + head.markov(item.token_ids[anchors])  # type: ignore[misc]
            all_logits = torch.full((1, VOCAB), -torch.inf)
            all_logits[:, slice(None) if head.token_ids is None else head.token_ids] = logits / 3
            item.token_ids[position] = sample_rows(all_logits, torch.tensor([seed]), torch.tensor([position]))
    sampled = evaluate(drafter.model, head, TARGET.embedding, [item])
    other = evaluate(drafter.model, head, TARGET.embedding, [replace(item, id=AnswerId("chat", 1, 3.0))])
    assert sampled.emitted_per_step() > 1.5 * other.emitted_per_step()


@pytest.mark.parametrize("length", [2, 3])
def test_answers_with_nothing_behind_their_first_token_count_nothing(length: int) -> None:
    head: DraftHead = random_drafter(CONFIG).head(TARGET)
    report = evaluate(random_drafter(CONFIG).model, head, TARGET.embedding, [answer(length)])
    assert dict(report.steps) == {} and report.accepted_by_slot == [0, 0, 0, 0]
    assert report.emitted_per_step() == 0.0


def test_a_summary_has_all_and_every_category() -> None:
    report = AcceptanceReport()
    report.steps.update({"math": 3, "chat": 5})
    report.emitted.update({"math": 4, "chat": 10})
    assert report.summary() == {"all": 1.75, "chat": 2.0, "math": 1.333}
    assert list(report.summary()) == ["all", "chat", "math"]
    assert report.emitted_per_step("math") == pytest.approx(4 / 3)
    assert report.emitted_per_step("code") == 0.0


ANSWERS = [answer(9, 2, "chat", 1), answer(14, 5, "math", 2), answer(21, 1, "chat", 3), answer(3, 2, "code", 4)]
CONFIGS = {"shift": CONFIG, "dflash": dflash_config(), "causal dflash": dflash_config(causal=True)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_one_pass_of_the_network_that_serves_counts_the_same(config: DrafterConfig) -> None:
    drafter = random_drafter(config)
    expected = evaluate(drafter.model, drafter.head(TARGET), TARGET.embedding, follow(drafter, ANSWERS))
    report = evaluate_serving(random_drafter(config), TARGET, follow(drafter, ANSWERS), ProposalOptions(99))
    assert report == expected
    assert sum(expected.accepted_by_slot) > 4 and report.passes == report.steps


def follow(drafter: Drafter, answers: list[Answer]) -> list[Answer]:
    """The answers, going on here and there as the drafter says in one pass, so that some drafts are accepted."""
    head, followed = drafter.head(TARGET), []
    for item in answers:
        tokens = item.token_ids.clone()
        for position in range(item.prompt_len, len(tokens) - 1, 3):
            batch = make_batch([replace(item, token_ids=tokens)], [torch.tensor([position])], drafter.model.config)
            with torch.inference_mode():
                hidden = run_blocks(drafter.model, batch, TARGET.embedding)
                drafts = head.walk(head.logits(hidden), batch.anchor_tokens).tokens[0]
            count = min(2, len(tokens) - 1 - position)
            tokens[position + 1 : position + 1 + count] = drafts[:count]
        followed.append(replace(item, token_ids=tokens))
    return followed


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_refined_drafts_are_those_of_the_server(config: DrafterConfig) -> None:
    options = ProposalOptions(99, max_passes=3, observe_threshold=0.7)
    proposer = BlockDiffusionProposer(random_drafter(config), options, "d")
    engine, tokens = SimulatedEngine(proposer, TARGET), [5, 17, 30, 2]
    engine.add("a", tokens)
    steps, emitted = 0, [9]
    while len(tokens) < 20:
        tokens += emitted
        drafts, _ = engine.step({"a": Work(drafts=emitted[:-1], emitted=emitted)})["a"]
        # The target agrees with all but the last draft token of every step.
        emitted, steps = [*drafts[:-1], (drafts[-1] + 1) % VOCAB], steps + 1
    tokens += emitted
    passes = proposer.command("counters", {})["passes"]
    assert passes > steps
    hidden = {i: states.half() for i, states in engine.hidden_states(tokens).items()}
    item = Answer(AnswerId("chat", 0, 0.0), 4, torch.tensor(tokens), hidden)
    report = evaluate_serving(random_drafter(config), TARGET, [item], options)
    assert dict(report.steps) == {"chat": steps} and dict(report.passes) == {"chat": passes}
    assert report.emitted["chat"] == len(tokens) - 5


def test_thresholds_know_requests_by_the_answers_they_are_from() -> None:
    seen: set[str] = set()

    class Watching:
        def at(self, pass_number: int, request_ids: Sequence[str], drafts: int) -> torch.Tensor:
            seen.update(request_ids)
            return torch.full((len(request_ids), drafts), 0.0 if request_ids[0].startswith("chat") else 2.0)

    report = evaluate_serving(random_drafter(CONFIG), TARGET, ANSWERS, ProposalOptions(99, max_passes=2), Watching())
    assert seen == {"chat/1/0", "math/2/0", "chat/3/0"}
    assert report.passes["chat"] == 2 * report.steps["chat"] and report.passes["math"] == report.steps["math"]


@pytest.mark.parametrize("cap", [1, 2])
def test_a_cap_on_draft_tokens_bounds_what_is_accepted(cap: int) -> None:
    drafter = random_drafter(CONFIG)
    report = evaluate_serving(random_drafter(CONFIG), TARGET, follow(drafter, ANSWERS), ProposalOptions(cap))
    assert len(report.accepted_by_slot) == cap and report.accepted_by_slot[0] > 0
    assert max(report.emitted[c] / report.steps[c] for c in report.steps) <= cap + 1


def test_no_answers_count_nothing() -> None:
    report = evaluate_serving(random_drafter(CONFIG), TARGET, [], ProposalOptions(99))
    assert report.emitted_per_step() == 0.0
