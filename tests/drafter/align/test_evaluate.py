import pytest
import torch

from drafter.align.batches import make_batch, run_blocks
from drafter.align.corpus import Answer, AnswerId
from drafter.align.evaluate import AcceptanceReport, evaluate
from drafter.head import DraftHead
from tests.drafter.tiny import HIDDEN, VOCAB, random_drafter, random_target, shift_config

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

    def walk(self, hidden: torch.Tensor, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        item, right = next(self.calls)
        count = hidden.shape[1]
        rows = []
        for i, good in enumerate(right):
            position = item.prompt_len + i
            assert anchors[i] == item.token_ids[position]
            following = item.token_ids[position + 1 : position + 1 + count].tolist()
            following += [0] * (count - len(following))
            rows.append([token if k < good else (token + 1) % VOCAB for k, token in enumerate(following)])
        return torch.tensor(rows), torch.zeros(len(rows), count)


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
        drafts, _ = head.walk(hidden, item.token_ids[anchors])
    # The answer follows the drafts for a while, so that some are accepted.
    item.token_ids[3:6] = drafts[0, :3]
    with torch.inference_mode():
        hidden = run_blocks(drafter.model, make_batch([item], [anchors], CONFIG), TARGET.embedding)
        drafts, _ = head.walk(hidden, item.token_ids[anchors])
    steps = simulate(item.token_ids.tolist(), 2, dict(zip(anchors.tolist(), drafts.tolist(), strict=True)))
    report = evaluate(drafter.model, head, TARGET.embedding, [item])
    assert report.steps["chat"] == len(steps) < 9
    assert report.emitted["chat"] == sum(emitted for emitted, _ in steps) == 9


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
