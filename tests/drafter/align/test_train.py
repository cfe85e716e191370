import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter.align import train as train_module
from drafter.align.batches import BlockBatch, make_batch, run_blocks
from drafter.align.corpus import Answer, AnswerId, Corpus, ShardWriter, is_held_out
from drafter.align.initial import TargetWeights, read_target
from drafter.align.options import Objective
from drafter.align.ranks import Ranks
from drafter.align.train import StepReport, Trainer, TrainOptions, read_history
from drafter.checkpoint import Drafter, load_drafter, save_drafter
from drafter.config import DrafterConfig
from drafter.errors import DrafterCheckpointError
from drafter.options import ProposalOptions
from drafter.proposer import BlockDiffusionProposer
from drafter.serving import ServingDrafter
from tests.drafter.align.two_ranks import run_on_two_ranks
from tests.drafter.simulated_engine import SimulatedEngine, Work
from tests.drafter.tiny import HIDDEN, LAYERS, VOCAB, dflash_config, fill, random_drafter, shift_config, write_target

OPTIONS = TrainOptions(
    steps=8,
    answers_per_step=2,
    anchors_per_answer=3,
    learning_rate=1e-2,
    copied_layers=(2, 3),
    evaluate_every=4,
    save_every=3,
)
CONFIG = shift_config()
TOKEN_IDS = torch.arange(24)


@pytest.fixture
def target(tmp_path: Path) -> TargetWeights:
    write_target(tmp_path / "target")
    return read_target(tmp_path / "target")


def write_corpus(folder: Path, target: TargetWeights, answers: int = 8) -> Corpus:
    """Answers that count upwards, with hidden states from which the target predicts just that."""
    writer, generator = ShardWriter(folder), torch.Generator().manual_seed(4)
    for index in range(answers):
        tokens = (torch.arange(14) + 3 * index) % 20
        states = {layer: 0.1 * torch.randn(14, HIDDEN, generator=generator) for layer in (1, 3, LAYERS)}
        states[1] += target.embedding[tokens]
        states[LAYERS][:-1] = target.output_head[tokens[1:]] / target.final_norm
        hidden = {layer: state.half() for layer, state in states.items()}
        # Index 0 is held out from training.
        writer.add(Answer(AnswerId("chat", index, 0.0), 3, tokens, hidden))
    writer.flush()
    return Corpus(folder, (1, 3, LAYERS))


@pytest.fixture
def corpus(tmp_path: Path, target: TargetWeights) -> Corpus:
    return write_corpus(tmp_path / "corpus", target)


@pytest.fixture
def train(target: TargetWeights, corpus: Corpus, tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a trainer whose run folder is ``name``."""

    def make(name: str = "run", config: DrafterConfig = CONFIG, **changes: Any) -> Trainer:
        token_ids = None if config.draft_vocab_size == VOCAB else TOKEN_IDS
        return Trainer(tmp_path / name, corpus, target, config, token_ids, replace(OPTIONS, **changes))

    return make


def interrupt_at(step: int) -> Callable[[StepReport], None]:
    def watch(report: StepReport) -> None:
        if report.step == step:
            raise KeyboardInterrupt

    return watch


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


@pytest.mark.parametrize("config", [CONFIG, dflash_config(qk_norm=False)], ids=["shift", "dflash"])
def test_the_loss_falls_and_drafts_get_accepted(train: Callable[..., Trainer], config: DrafterConfig) -> None:
    trainer, reports = train(config=config, steps=24, evaluate_every=24, save_every=24), list[StepReport]()
    before = trainer.evaluate()
    trainer.run(reports.append)
    assert [report.step for report in reports] == list(range(1, 25))
    first, last = (sum(r.loss for r in part) / 5 for part in (reports[:5], reports[-5:]))
    assert last < 0.7 * first
    after = reports[-1].report
    assert after is not None
    assert after.greedy.emitted_per_step("chat") > before.greedy.emitted_per_step("chat") + 0.3


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_the_loss_is_what_it_says(
    tmp_path: Path, target: TargetWeights, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Cross-entropy with the target's token where it can be drafted, and with its distribution everywhere.

    Draft tokens that a block is given do not count, and the others are predicted with them in view.
    """
    config, token_ids = shift_config(draft_vocab_size=20), torch.arange(0, VOCAB, 2)
    options = replace(OPTIONS, steps=1, answers_per_step=7, anchors_per_answer=99, slot_decay=2.0, observed_share=share)
    given: dict[int, torch.Tensor] = {}

    def watched(batch: BlockBatch, **changes: Any) -> BlockBatch:
        """Note which draft tokens of which answer are given: answers are known by their first anchor's token."""
        observed = changes["observed"]
        if observed is not None:
            for start in range(0, 70, 10):
                given[int(batch.anchor_tokens[start])] = observed[start : start + 10]
        return replace(batch, **changes)

    monkeypatch.setattr(train_module, "replace", watched)
    trainer, losses = Trainer(tmp_path / "run", corpus, target, config, token_ids, options), list[float]()
    fill(trainer.drafter.model, torch.Generator().manual_seed(1))
    model = copy.deepcopy(trainer.drafter.model)
    trainer.run(lambda report: losses.append(report.loss))
    assert len(given) == (7 if share else 0)
    assert model.markov is not None
    hard, soft, hard_weight, soft_weight = 0.0, 0.0, 0.0, 0.0
    with torch.no_grad():
        for index in range(1, 8):
            answer = corpus.read(index)
            anchors = torch.arange(3, 13)
            observed = given[int(answer.token_ids[3])] if share else None
            batch = replace(make_batch([answer], [anchors], config), observed=observed)
            hidden = run_blocks(model, batch, target.embedding)
            for block, anchor in enumerate(anchors.tolist()):
                for slot, position in enumerate(range(anchor, min(anchor + 4, 13))):
                    if observed is not None and observed[block, slot]:
                        continue
                    # The row at ``position`` predicts the token behind it.
                    logits = target.output_head[token_ids] @ hidden[block, slot]
                    student = (logits + model.markov(answer.token_ids[position])).log_softmax(-1)
                    final = answer.hidden[LAYERS][position].float()
                    normed = final * (final.square().mean() + 1e-5).rsqrt() * target.final_norm
                    teacher = (target.output_head[token_ids] @ normed).softmax(-1)
                    weight = math.exp(-slot / 2)
                    soft -= weight * float((teacher * student).sum())
                    soft_weight += weight
                    if int(answer.token_ids[position + 1]) % 2 == 0:
                        hard -= weight * float(student[teacher.argmax()])
                        hard_weight += weight
    assert losses == pytest.approx([0.5 * hard / hard_weight + 0.5 * soft / soft_weight], rel=1e-4)


def test_anchors_are_drawn_anew_at_every_step(train: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []

    def watched(answers: list[Answer], anchors: list[torch.Tensor], config: DrafterConfig) -> BlockBatch:
        drawn.extend(positions.tolist() for positions in anchors)
        return make_batch(answers, anchors, config)

    monkeypatch.setattr(train_module, "make_batch", watched)
    train().run(lambda report: None)
    assert len(drawn) == 16
    for positions in drawn:
        assert len(set(positions)) == 3 and positions == sorted(positions)
        assert set(positions) <= set(range(3, 13))
    assert len({tuple(positions) for positions in drawn}) > 12


def test_the_learning_rate_rises_and_falls(train: Callable[..., Trainer], tmp_path: Path) -> None:
    rates: list[list[float]] = []

    def watch(report: StepReport) -> None:
        del report
        state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
        rates.append([group["lr"] for group in state["optimizer"]["param_groups"]])

    train(save_every=1, warmup=0.25, learning_rate=0.1, new_tensor_factor=3.0).run(watch)
    copied = [0.05, 0.1] + [0.05 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert [rate for rate, _ in rates] == pytest.approx(copied)
    assert [rate for _, rate in rates] == pytest.approx([3 * rate for rate in copied])


def test_half_the_precision_trains_too(train: Callable[..., Trainer]) -> None:
    losses: list[float] = []
    trainer = train(precision="bfloat16", steps=3)
    trainer.run(lambda report: losses.append(report.loss))
    assert all(math.isfinite(loss) for loss in losses)
    assert {p.dtype for p in trainer.drafter.model.parameters()} == {torch.float32}


def test_steps_that_evaluate_carry_a_report(train: Callable[..., Trainer], tmp_path: Path) -> None:
    reports: list[StepReport] = []
    train().run(reports.append)
    assert [report.step for report in reports if report.report is not None] == [4, 8]
    assert {report.steps for report in reports} == {8}
    history = read_history(tmp_path / "run" / "history.jsonl")
    for entry, report in zip(history, (reports[3], reports[7]), strict=True):
        assert report.report is not None
        assert entry == {
            "step": report.step,
            "seconds": round(report.seconds, 1),
            "loss": round(report.loss, 4),
            "emitted_per_verify_step": report.report.greedy.summary(),
        }


def test_sampled_answers_are_measured_too_where_there_are_any(
    target: TargetWeights, train: Callable[..., Trainer], tmp_path: Path
) -> None:
    assert train().evaluate().sampled is None
    writer = ShardWriter(tmp_path / "corpus")
    greedy = Corpus(tmp_path / "corpus", (1, 3, LAYERS)).read(0)
    writer.add(replace(greedy, id=AnswerId("math", 0, 1.0)))
    writer.add(replace(greedy, id=AnswerId("math", 0, 0.7)))
    writer.flush()
    corpus = Corpus(tmp_path / "corpus", (1, 3, LAYERS))
    trainer = Trainer(tmp_path / "both", corpus, target, CONFIG, TOKEN_IDS, OPTIONS)
    measured = trainer.evaluate()
    assert measured.sampled is not None and set(measured.sampled.steps) == {"math"}
    assert set(measured.greedy.steps) == {"chat"}
    assert list(measured.to_json()) == ["emitted_per_verify_step", "sampled_emitted_per_verify_step"]


def test_the_last_weights_are_averaged(train: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "_AVERAGED_EVERY", 2)
    seen: list[dict[str, torch.Tensor]] = []
    plain = train("plain", averaged_share=0.0)
    plain.run(lambda report: seen.append(copy.deepcopy(plain.drafter.model.state_dict())))
    averaged = train("averaged", averaged_share=0.5)
    averaged.run(lambda report: None)
    for name, value in averaged.drafter.model.state_dict().items():
        torch.testing.assert_close(value, (seen[5][name] + seen[7][name]) / 2)
    resumed = train("averaged", averaged_share=0.5)
    assert torch.equal(resumed.drafter.model.fc.weight, averaged.drafter.model.fc.weight)


_TWO_RANKS = """
import sys
from pathlib import Path
import torch
from drafter.align.corpus import Corpus
from drafter.align.initial import read_target
from drafter.align.ranks import Ranks
from drafter.align.train import Trainer
from tests.drafter.align.test_train import CONFIG, LAYERS, OPTIONS, TOKEN_IDS
folder, ranks, losses = Path(sys.argv[1]), Ranks.join(), []
corpus = Corpus(folder / "corpus", (1, 3, LAYERS))
trainer = Trainer(folder / "two", corpus, read_target(folder / "target"), CONFIG, TOKEN_IDS, OPTIONS, ranks)
trainer.run(lambda report: losses.append(report.loss))
torch.save((losses, trainer.drafter.model.state_dict()), folder / f"rank-{ranks.rank}.pt")
ranks.leave()
"""


def test_two_ranks_train_one_drafter(train: Callable[..., Trainer], tmp_path: Path) -> None:
    train("one")  # makes target and corpus
    run_on_two_ranks(_TWO_RANKS, tmp_path)
    (losses, weights), (other_losses, other_weights) = (torch.load(tmp_path / f"rank-{r}.pt") for r in (0, 1))
    assert losses == other_losses and losses[-1] < losses[0]
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    saved = load_drafter(tmp_path / "two" / "checkpoint").model.state_dict()
    torch.testing.assert_close(saved["norm.weight"], weights["norm.weight"], rtol=1e-2, atol=1e-2)
    assert [entry["step"] for entry in read_history(tmp_path / "two" / "history.jsonl")] == [4, 8]


def test_more_ranks_than_answers_of_a_step_are_refused(tmp_path: Path, corpus: Corpus, target: TargetWeights) -> None:
    with pytest.raises(ValueError, match="a step of 2 answers cannot be shared by 3 ranks"):
        Trainer(tmp_path / "run", corpus, target, CONFIG, TOKEN_IDS, OPTIONS, Ranks(0, 3))


@pytest.mark.parametrize("objective", Objective)
def test_every_objective_trains(train: Callable[..., Trainer], objective: Objective) -> None:
    losses: list[float] = []
    train(objective=objective, steps=24, evaluate_every=24).run(lambda report: losses.append(report.loss))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("interruptions", [[3], [1, 5, 7]])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    train: Callable[..., Trainer], tmp_path: Path, interruptions: list[int]
) -> None:
    train("whole").run(lambda report: None)
    for step in interruptions:
        with pytest.raises(KeyboardInterrupt):
            train("parts").run(interrupt_at(step))
    resumed, seen = train("parts"), list[int]()
    saved = interruptions[-1] // 3 * 3
    assert resumed.step == saved
    resumed.run(lambda report: seen.append(report.step))
    assert seen == list(range(saved + 1, 9))
    for file in ("model.safetensors", "slipstream.safetensors", "config.json"):
        whole, parts = (tmp_path / name / "checkpoint" / file for name in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), file
    whole, parts = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert whole["optimizer"]["param_groups"] == parts["optimizer"]["param_groups"]
    histories = [read_history(tmp_path / name / "history.jsonl") for name in ("whole", "parts")]
    assert without_seconds(histories[0]) == without_seconds(histories[1])


def test_a_run_interrupted_before_its_first_state_starts_its_history_anew(
    train: Callable[..., Trainer], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(evaluate_every=1).run(interrupt_at(2))
    train(evaluate_every=1).run(lambda report: None)
    assert [entry["step"] for entry in read_history(tmp_path / "run" / "history.jsonl")] == list(range(1, 9))


def test_a_finished_run_has_nothing_left_to_do(train: Callable[..., Trainer], tmp_path: Path) -> None:
    train().run(lambda report: None)
    before = (tmp_path / "run" / "checkpoint" / "model.safetensors").read_bytes()
    train().run(interrupt_at(1))
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").read_bytes() == before


def test_the_time_of_earlier_parts_counts(train: Callable[..., Trainer]) -> None:
    reports: list[StepReport] = []

    def watch(report: StepReport) -> None:
        reports.append(report)
        interrupt_at(6)(report)

    with pytest.raises(KeyboardInterrupt):
        train().run(watch)
    train().run(reports.append)
    assert reports[6].step == 7 and reports[6].seconds > reports[5].seconds


def test_an_interrupted_save_keeps_the_state_before(
    train: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train().run(interrupt_at(4))

    def cut_off(state: object, path: Path) -> None:
        del state
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train().run(lambda report: None)
    assert train().step == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 9},
        {"learning_rate": 1e-3},
        {"seed": 1},
        {"copied_layers": (1, 3)},
        {"precision": "bfloat16"},
        {"observed_share": 0.5},
    ],
)
def test_a_state_of_other_options_is_refused(
    train: Callable[..., Trainer], tmp_path: Path, changes: dict[str, Any]
) -> None:
    train(steps=3, evaluate_every=3).run(lambda report: None)
    with pytest.raises(ValueError, match=f"{tmp_path / 'run' / 'state.pt'} was trained with other options"):
        train(**{"steps": 3, "evaluate_every": 3, **changes})


def test_a_state_of_another_drafter_is_refused(train: Callable[..., Trainer]) -> None:
    train(steps=3, evaluate_every=3).run(lambda report: None)
    with pytest.raises(ValueError, match="was trained with other options"):
        train(config=shift_config(causal=False), steps=3, evaluate_every=3)


@pytest.mark.timeout(10)
def test_a_corpus_smaller_than_one_step_is_refused(train: Callable[..., Trainer]) -> None:
    with pytest.raises(ValueError, match="7 answers.* 8"):
        train(answers_per_step=8).run(lambda report: None)


def test_training_with_given_draft_tokens_resumes_too(train: Callable[..., Trainer], tmp_path: Path) -> None:
    train("whole", observed_share=0.5).run(lambda report: None)
    with pytest.raises(KeyboardInterrupt):
        train("parts", observed_share=0.5).run(interrupt_at(5))
    train("parts", observed_share=0.5).run(lambda report: None)
    train("none").run(lambda report: None)
    weights = [
        torch.load(tmp_path / name / "state.pt", weights_only=True)["model"]["layers.0.qkv_proj.weight"]
        for name in ("whole", "parts", "none")
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A drafter that the target's layers would not give."""
    save_drafter(replace(random_drafter(CONFIG, seed=3), token_ids=TOKEN_IDS), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_training_starts_from_a_checkpoint(train: Callable[..., Trainer], checkpoint: Path) -> None:
    trainer, stored = train(initial=checkpoint, copied_layers=()), load_drafter(checkpoint).model.state_dict()
    for name, tensor in trainer.drafter.model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    reports: list[StepReport] = []
    trainer.run(reports.append)
    assert len(reports) == 8
    assert all(not torch.equal(p, stored[name]) for name, p in trainer.drafter.model.named_parameters())


def test_a_run_from_a_checkpoint_resumes_wherever_that_lies_but_from_no_other(
    train: Callable[..., Trainer], checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(initial=checkpoint).run(interrupt_at(4))
    moved = (tmp_path / "elsewhere").resolve() / "checkpoint"
    moved.parent.mkdir()
    checkpoint.rename(moved)
    assert train(initial=moved).step == 3
    with pytest.raises(ValueError, match="was trained with other options"):
        train()
    save_drafter(replace(random_drafter(CONFIG, seed=4), token_ids=TOKEN_IDS), moved)
    with pytest.raises(ValueError, match="was trained with other options"):
        train(initial=moved)


@pytest.mark.parametrize(
    "drafter",
    [
        replace(random_drafter(shift_config(block_size=3)), token_ids=TOKEN_IDS),
        replace(random_drafter(CONFIG), token_ids=TOKEN_IDS + 1),
    ],
    ids=["another shape", "another vocabulary"],
)
def test_a_checkpoint_of_another_drafter_is_refused(
    train: Callable[..., Trainer], tmp_path: Path, drafter: Drafter
) -> None:
    save_drafter(drafter, tmp_path / "other")
    with pytest.raises(ValueError, match=f"{tmp_path / 'other'} is another drafter than the one to train"):
        train(initial=tmp_path / "other")


def test_a_folder_without_a_checkpoint_is_refused(train: Callable[..., Trainer], tmp_path: Path) -> None:
    with pytest.raises(DrafterCheckpointError, match="is not a drafter checkpoint"):
        train(initial=tmp_path / "nothing")


def test_options_are_told_without_folders(checkpoint: Path) -> None:
    told = replace(OPTIONS, initial=checkpoint).to_json()
    assert told["initial"]["name"] == "checkpoint" and len(told["initial"]["sha256"]) == 64
    assert {**told, "initial": None} == OPTIONS.to_json()
    assert str(checkpoint.parent) not in json.dumps(told)


def test_different_seeds_train_different_drafters(train: Callable[..., Trainer]) -> None:
    weights = []
    for seed in (0, 1):
        trainer = train(f"run-{seed}", steps=1, seed=seed)
        trainer.run(lambda report: None)
        weights.append(trainer.drafter.model.state_dict()["layers.0.qkv_proj.weight"])
    assert not torch.equal(*weights)


def test_the_checkpoint_is_the_trained_drafter(train: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = train()
    trainer.run(lambda report: None)
    loaded: Drafter = load_drafter(tmp_path / "run" / "checkpoint")
    assert loaded.model.config == CONFIG
    assert loaded.token_ids is not None and torch.equal(loaded.token_ids, TOKEN_IDS)
    trained = trainer.drafter.model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, trained[name].half().float()), name


def test_held_out_answers_are_never_trained_on(
    train: Callable[..., Trainer], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, read = train(steps=6, evaluate_every=100), list[int]()
    original = Corpus.read

    def watched(self: Corpus, index: int) -> Answer:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(Corpus, "read", watched)
    trainer.run(lambda report: None)
    held_out = [i for i, answer in enumerate(corpus.ids) if is_held_out(answer.prompt_index)]
    assert held_out == [0] and read[12:] == [0]  # the evaluation that ends the run
    assert 0 not in read[:12]
    # An epoch has three steps of two different answers.
    assert len(set(read[:6])) == len(set(read[6:12])) == 6


def test_the_history_of_no_run_is_empty(tmp_path: Path) -> None:
    assert read_history(tmp_path / "history.jsonl") == []


@pytest.mark.parametrize("config", [CONFIG, dflash_config(), dflash_config(causal=True)], ids=str)
@torch.inference_mode()
def test_training_and_serving_compute_the_same_hidden_states(
    config: DrafterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee = random_drafter(config)
    options = ProposalOptions(config.num_draft_tokens)
    engine = SimulatedEngine(BlockDiffusionProposer(random_drafter(config), options, "d"), num_pages=40)
    tokens = [(7 * i) % VOCAB for i in range(14)]
    hidden = {i: states.half() for i, states in engine.hidden_states(tokens).items()}
    answer, anchors = Answer(AnswerId("chat", 1, 0.0), 4, torch.tensor(tokens), hidden), [4, 7, 8, 12]
    batch = make_batch([answer], [torch.tensor(anchors)], config)
    trained = run_blocks(trainee.model, batch, engine.target.embedding)
    served: list[torch.Tensor] = []
    run = ServingDrafter.run

    def recording(self: ServingDrafter, *arguments: Any) -> torch.Tensor:
        served.append(run(self, *arguments))
        return served[-1]

    monkeypatch.setattr(ServingDrafter, "run", recording)
    for anchor in anchors:
        engine.add(str(anchor), tokens[:anchor])
    engine.step({str(anchor): Work(emitted=[tokens[anchor]]) for anchor in anchors})
    predicting = served[0][:, -config.num_draft_tokens :]
    torch.testing.assert_close(predicting, trained, rtol=1e-4, atol=1e-5)
