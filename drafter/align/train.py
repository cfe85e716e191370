"""The training loop: resumable, the same result for the same seed however often it was interrupted."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from drafter.align.average import WeightAverage
from drafter.align.batches import BlockBatch, anchor_range, draw_observed, make_batch, run_blocks
from drafter.align.corpus import Answer, Corpus, is_held_out
from drafter.align.evaluate import AcceptanceReport, evaluate
from drafter.align.flops import counted
from drafter.align.initial import TargetWeights, initial_drafter
from drafter.align.objectives import DraftSlots, loss_of
from drafter.align.options import Objective
from drafter.align.provenance import checkpoint_file
from drafter.align.ranks import Ranks
from drafter.checkpoint import Drafter, load_drafter, save_drafter
from drafter.config import DrafterConfig
from drafter.head import DraftHead

_AVERAGED_EVERY = 10  # steps


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How to train.

    Attributes:
        steps: optimiser steps of the whole run; the learning rate falls to zero at the last.
        answers_per_step: answers packed into one step.
        anchors_per_answer: blocks drawn from each of them.
        learning_rate: peak, for tensors copied from the target.
        new_tensor_factor: multiplies it for tensors that start from nothing.
        warmup: share of the steps that the rate rises.
        objective: what is minimised.
        slot_decay: slot ``k`` weighs ``exp(-k / slot_decay)``.
        distillation_share: weight of the target's distribution against the target's most likely token.
        observed_share: share of the blocks in which some draft tokens are given, as refinement passes find them.
        copied_layers: the target's layers that the drafter starts from.
        initial: checkpoint folder to start from instead.
        averaged_share: share of the steps, the last ones, whose weights are averaged in the end; 0 keeps the last.
        precision: ``float32``, or ``bfloat16`` for mixed precision.
        evaluate_every: steps between evaluations.
        save_every: steps between saved states.
        held_out_answers: the most answers that evaluation reads.
        seed: of initialisation, order and anchors.
    """

    steps: int
    answers_per_step: int = 6
    anchors_per_answer: int = 32
    learning_rate: float = 8e-4
    new_tensor_factor: float = 2.0
    warmup: float = 0.04
    objective: Objective = Objective.FALLING
    slot_decay: float = 3.0
    distillation_share: float = 0.5
    observed_share: float = 0.0
    copied_layers: tuple[int, ...] = (28, 29)
    initial: Path | None = None
    averaged_share: float = 0.1
    precision: str = "float32"
    evaluate_every: int = 250
    save_every: int = 100
    held_out_answers: int = 40
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values; the checkpoint to start from is named by its content, wherever it lies."""
        initial = None if self.initial is None else asdict(checkpoint_file(self.initial))
        return {**asdict(self), "initial": initial, "objective": self.objective.value}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How drafts of held-out answers fare, greedy ones and, if the corpus holds any, ones sampled at temperature 1."""

    greedy: AcceptanceReport
    sampled: AcceptanceReport | None

    def to_json(self) -> dict[str, Any]:
        """Emitted tokens per verify step by category."""
        sampled = {} if self.sampled is None else {"sampled_emitted_per_verify_step": self.sampled.summary()}
        return {"emitted_per_verify_step": self.greedy.summary(), **sampled}


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step tells whoever watches.

    Attributes:
        seconds: that training took so far.
        step_seconds: that this step took, without an evaluation.
        report: of steps that evaluated.
    """

    step: int
    steps: int
    loss: float
    seconds: float
    step_seconds: float
    report: Evaluation | None


class Trainer:
    """Trains one drafter in ``folder``, which holds its state between interruptions.

    Args:
        folder: run folder; ``state.pt`` and ``history.jsonl`` live there, the result under ``checkpoint/``.
        corpus: opened with the drafter's layers and with the target's last hidden state.
        target: the frozen parts.
        config: the drafter.
        token_ids: draft vocabulary, or ``None``.
        options: how to train; a saved state of other options is refused.
        ranks: that train together; only the first one writes to the folder.

    Raises:
        DrafterCheckpointError: the checkpoint to start from cannot be read.
        ValueError: it is another drafter than ``config`` and ``token_ids`` describe, the corpus is too small for one
            step, or the folder holds the state of another run.
    """

    def __init__(
        self,
        folder: Path,
        corpus: Corpus,
        target: TargetWeights,
        config: DrafterConfig,
        token_ids: torch.Tensor | None,
        options: TrainOptions,
        ranks: Ranks | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._corpus, self._target, self._options = folder, corpus, target, options
        self.drafter: Drafter = _start(config, target, token_ids, options)
        self._model = self.drafter.model
        rows = target.output_head if token_ids is None else target.output_head[token_ids]
        self._head = DraftHead(rows.contiguous(), token_ids, self._model.markov)
        self._label_index = torch.full((len(target.embedding) + 1,), -1)
        self._label_index[: len(target.embedding)] = _inverse(token_ids, len(target.embedding))
        self._final_layer = max(corpus.layers)
        self._ranks, self._average = ranks or Ranks(), WeightAverage()
        self._optimizer = self._make_optimizer()
        self._held_out = {temperature: self._kept(temperature) for temperature in (0.0, 1.0)}
        self._training = [
            i
            for i, answer in enumerate(corpus.ids)
            if not is_held_out(answer.prompt_index) and corpus.answer_tokens(i) > 2
        ]
        if options.answers_per_step < self._ranks.size:
            raise ValueError(
                f"a step of {options.answers_per_step} answers cannot be shared by {self._ranks.size} ranks"
            )
        if len(self._training) < options.answers_per_step:
            raise ValueError(
                f"the corpus has {len(self._training)} answers to train on, one step takes {options.answers_per_step}"
            )
        self.step = 0
        self._seconds = 0.0
        self._resume()

    def run(self, watch: Callable[[StepReport], None]) -> None:
        """Train to the last step, reporting each; save the checkpoint at the end."""
        order, steps = self._order(), self._options.steps
        for _ in range(self.step):
            next(order)
        started = time.monotonic() - self._seconds
        while self.step < steps:
            begun = time.monotonic()
            loss = self._train_step(next(order))
            taken = time.monotonic() - begun
            self.step += 1
            self._seconds = time.monotonic() - started
            self._take_average()
            report = None
            if self._ranks.is_first:
                if self.step % self._options.evaluate_every == 0 or self.step == steps:
                    report = self.evaluate()
                    self._log(loss, report)
                if self.step % self._options.save_every == 0 or self.step == steps:
                    self._save()
            watch(StepReport(self.step, steps, loss, self._seconds, taken, report))
        if self._ranks.is_first:
            save_drafter(self.drafter, self._folder / "checkpoint")

    def step_flops(self) -> int:
        """Operations of a typical step on this rank; counting them changes no weights."""
        by_length = sorted(self._training, key=self._corpus.answer_tokens)
        middle = by_length[len(by_length) // 2 :][: self._options.answers_per_step]
        return counted(lambda: self._gradients(middle))[1]

    def _take_average(self) -> None:
        """Take the weights in near the end; behind the last step they become the mean."""
        steps = self._options.steps
        if self.step > (1 - self._options.averaged_share) * steps and self.step % _AVERAGED_EVERY == 0:
            self._average.add(self._model)
        if self.step == steps:
            self._average.put_into(self._model)

    def evaluate(self) -> Evaluation:
        """Emitted tokens per verify step on the held-out answers."""
        self._model.eval()
        reports = [
            evaluate(self._model, self._head, self._target.embedding, [self._corpus.read(i) for i in held_out])
            for held_out in self._held_out.values()
        ]
        self._model.train()
        return Evaluation(reports[0], reports[1] if self._held_out[1.0] else None)

    def _kept(self, temperature: float) -> list[int]:
        """Held-out answers to measure on."""
        ids = enumerate(self._corpus.ids)
        kept = [i for i, answer in ids if is_held_out(answer.prompt_index) and answer.temperature == temperature]
        return kept[: self._options.held_out_answers]

    def _train_step(self, indices: list[int]) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.learning_rate * group["factor"] * self._schedule()
        loss = self._gradients(indices)
        self._ranks.average_gradients(self._model.parameters())
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return self._ranks.average(loss)

    def _gradients(self, indices: list[int]) -> float:
        """Leave the gradients of this rank's share of some answers with the parameters; returns the loss."""
        options = self._options
        chance = (options.seed * 1_000_003 + self.step) * self._ranks.size + self._ranks.rank
        generator = torch.Generator().manual_seed(chance)
        answers = [self._corpus.read(i) for i in self._ranks.share(indices)]
        anchors = [_draw_anchors(answer, options.anchors_per_answer, generator) for answer in answers]
        batch = make_batch(answers, anchors, self._model.config)
        observed = draw_observed(batch.labels, options.observed_share, self._model.config, generator)
        batch = replace(batch, observed=observed)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.precision == "bfloat16"):
            loss = self._loss(answers, batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return float(loss.detach())

    def _loss(self, answers: list[Answer], batch: BlockBatch) -> torch.Tensor:
        options = self._options
        logits = F.linear(run_blocks(self._model, batch, self._target.embedding), self._head.weight)
        if self._model.markov is not None:
            logits = logits + self._model.markov(batch.previous)
        logits = logits.float()
        with torch.no_grad():
            final = torch.cat([a.hidden[self._final_layer].float() for a in answers])
            final = F.rms_norm(final, final.shape[-1:], self._target.final_norm, self._model.config.rms_norm_eps)
            teacher = F.linear(final[batch.teacher_rows()], self._head.weight).float()
        counted = batch.counted()
        most_likely = torch.where(counted, teacher.argmax(dim=-1), -1)
        # Where the text itself goes on with a token outside the draft vocabulary, no draft can be accepted.
        most_likely[self._label_index[batch.labels] < 0] = -1
        slots = DraftSlots(logits, teacher, most_likely, counted)
        return loss_of(options.objective, slots, options.slot_decay, options.distillation_share)

    def _schedule(self) -> float:
        warmup = max(1, int(self._options.warmup * self._options.steps))
        if self.step < warmup:
            return (self.step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, self._options.steps - warmup)))

    def _order(self) -> Iterator[list[int]]:
        """Batches of answers, epoch after epoch, the same for the same seed."""
        generator = torch.Generator().manual_seed(self._options.seed)
        size = self._options.answers_per_step
        while True:
            shuffled = [self._training[i] for i in torch.randperm(len(self._training), generator=generator).tolist()]
            for start in range(0, len(shuffled) - size + 1, size):
                yield shuffled[start : start + size]

    def _make_optimizer(self) -> torch.optim.AdamW:
        copied = [p for name, p in self._model.named_parameters() if name.startswith(("layers.", "norm."))]
        new = [p for name, p in self._model.named_parameters() if not name.startswith(("layers.", "norm."))]
        groups = [{"params": copied, "factor": 1.0}, {"params": new, "factor": self._options.new_tensor_factor}]
        return torch.optim.AdamW(groups, lr=self._options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def _log(self, loss: float, report: Evaluation) -> None:
        entry = {"step": self.step, "seconds": round(self._seconds, 1), "loss": round(loss, 4)}
        with (self._folder / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, **report.to_json()}) + "\n")

    def _save(self) -> None:
        state = {
            "options": self._options.to_json(),
            "drafter": self._model.config.to_json(),
            "step": self.step,
            "seconds": self._seconds,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": self._average.state(),
        }
        unfinished = self._folder / "state.partial"
        torch.save(state, unfinished)
        os.replace(unfinished, self._folder / "state.pt")

    def _resume(self) -> None:
        path = self._folder / "state.pt"
        if not path.exists():
            self._keep_history()
            return
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["options"] != self._options.to_json() or state["drafter"] != self._model.config.to_json():
            raise ValueError(f"{path} was trained with other options; choose another run folder or remove it")
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._average.restore(state["average"])
        self.step, self._seconds = state["step"], state["seconds"]
        self._keep_history()

    def _keep_history(self) -> None:
        """Drop what was logged after the state that the run resumes from."""
        path = self._folder / "history.jsonl"
        if self._ranks.is_first:
            kept = [json.dumps(entry) + "\n" for entry in read_history(path) if entry["step"] <= self.step]
            path.write_text("".join(kept), encoding="utf-8")


def _start(
    config: DrafterConfig, target: TargetWeights, token_ids: torch.Tensor | None, options: TrainOptions
) -> Drafter:
    """The drafter before its first step."""
    if options.initial is None:
        return initial_drafter(config, target, token_ids, options.copied_layers, options.seed)
    drafter = load_drafter(options.initial)
    same_tokens = (
        drafter.token_ids is token_ids
        if drafter.token_ids is None or token_ids is None
        else torch.equal(drafter.token_ids, token_ids)
    )
    if drafter.model.config != config or not same_tokens:
        raise ValueError(f"{options.initial} is another drafter than the one to train")
    return drafter


def read_history(path: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, oldest first."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _draw_anchors(answer: Answer, count: int, generator: torch.Generator) -> torch.Tensor:
    candidates = torch.tensor(list(anchor_range(answer)))
    chosen = torch.randperm(len(candidates), generator=generator)[:count]
    return candidates[chosen].sort().values


def _inverse(token_ids: torch.Tensor | None, vocab_size: int) -> torch.Tensor:
    """``[vocab]`` index of every token in the draft vocabulary, -1 for those outside."""
    if token_ids is None:
        return torch.arange(vocab_size)
    index = torch.full((vocab_size,), -1)
    index[token_ids] = torch.arange(len(token_ids))
    return index
