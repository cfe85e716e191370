"""``slipstream align``: the target answers, the drafter learns, the checkpoint is written with its papers."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from drafter.align.collect import CollectOptions, collect, plan_answers, write_own_prompts
from drafter.align.prompts import Prompt, read_prompts, write_prompts
from drafter.errors import DrafterCheckpointError
from server.errors import DrafterError, InputError, ServerStartError
from server.flags import settings_of
from server.model_store import resolve_model
from server.preflight import check_drafter, kv_bytes_per_token, read_target_config
from server.progress import ProgressBar
from server.settings import Settings

if TYPE_CHECKING:
    import torch

    from drafter.align.corpus import Corpus
    from drafter.align.initial import TargetWeights
    from drafter.config import DrafterConfig

_MAX_LEN = 1024  # longest prompt and answer together, tokens
_TYPICAL_PROMPT = 256  # tokens; memory for this and a whole answer is kept for every request in flight
_LAYERS_READ = 5


def run(args: argparse.Namespace) -> int:
    """Run whatever of collecting and training the run folder does not hold yet; returns the exit code.

    Raises:
        SlipstreamError: the prompts, the target or the run folder cannot be used.
    """
    for flag, share in (("--observed-share", args.observed_share), ("--follow-ups", args.follow_ups)):
        if not 0 <= share <= 1:
            raise InputError(f"{flag} = {share:g} is not a share of 0 to 1")
    settings = settings_of(args)
    with ProgressBar("model") as progress:
        model = resolve_model(settings.model.source, settings.model.cache_dir, progress)
    if args.initial is not None:
        check_drafter(args.initial, model, read_target_config(model))
    args.run.mkdir(parents=True, exist_ok=True)
    try:
        asyncio.run(_collect(args, settings, model))
        _train(args, settings, model)
    except DrafterCheckpointError as error:
        raise DrafterError(str(error)) from error
    except ValueError as error:
        raise InputError(str(error)) from error
    return 0


async def _collect(args: argparse.Namespace, settings: Settings, model: Path) -> None:
    prompts = _known_prompts(args)
    options = CollectOptions(
        folder=args.run / "corpus",
        follow_ups=args.follow_ups,
        max_answer_tokens=args.max_answer,
        target_tokens=args.answer_tokens,
        concurrency=args.concurrency + args.concurrency // 4,
        seed=args.seed,
    )
    recorded = _recorded_tokens(options.folder)
    if recorded >= args.answer_tokens or (prompts is not None and not plan_answers(prompts, options)):
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("the corpus is not complete: run this command once without torchrun first")
    from scheduler.answering import RecordingEngine
    from scheduler.engine import EngineShape, engine_arguments, start_engine, stop_engine
    from scheduler.options import EngineOptions, RecorderOptions

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    layers = _hidden_state_layers(args, model)
    shape = EngineShape(
        model=str(model),
        dtype=settings.model.dtype,
        max_model_len=_MAX_LEN,
        max_num_seqs=args.concurrency,
        max_num_batched_tokens=_MAX_LEN,
        kv_cache_bytes=_kv_cache_bytes(args, settings, model),
        enable_prefix_caching=False,
        seed=args.seed,
    )
    print("starting the engine …", file=sys.stderr, flush=True)
    try:
        engine = start_engine(engine_arguments(shape, EngineOptions(recorder=RecorderOptions(options.folder, layers))))
    except RuntimeError as error:
        raise ServerStartError(f"the engine did not start: {error}") from error
    try:
        recording = RecordingEngine(engine)
        if prompts is None:
            with ProgressBar("prompts") as bar:
                tell = _counting(bar, 0, args.own_prompts, "prompts")
                own = await write_own_prompts(recording, args.own_prompts, args.seed, args.concurrency, tell)
            write_prompts(_own_prompts_file(args), own)
            prompts = [*_prompts_of_file(args), *own]
        with ProgressBar("corpus") as bar:
            tell = _counting(bar, recorded, args.answer_tokens, "tokens")
            left = CollectOptions(**{**asdict(options), "target_tokens": args.answer_tokens - recorded})
            await collect(recording, prompts, left, tell)
    finally:
        stop_engine(engine)


def _train(args: argparse.Namespace, settings: Settings, model: Path) -> None:
    import torch

    from drafter.align.card import write_card
    from drafter.align.corpus import Corpus
    from drafter.align.flops import measured_peak
    from drafter.align.initial import read_target
    from drafter.align.options import Objective
    from drafter.align.plot import plot_history
    from drafter.align.provenance import Provenance, commit, prompt_file, versions, without_folders
    from drafter.align.ranks import Ranks
    from drafter.align.train import StepReport, Trainer, TrainOptions, read_history

    ranks = Ranks.join()
    target = read_target(model)
    corpus = Corpus(args.run / "corpus", _hidden_state_layers(args, model))
    config, token_ids, copied = _drafter_to_train(args, target, corpus)
    options = TrainOptions(
        steps=args.steps,
        learning_rate=args.learning_rate,
        objective=Objective(args.objective),
        observed_share=args.observed_share,
        copied_layers=copied,
        initial=args.initial,
        precision=args.precision,
        seed=args.seed,
    )
    trainer = Trainer(args.run, corpus, target, config, token_ids, options, ranks)
    with ProgressBar("training") as bar:
        peak = measured_peak(torch.bfloat16 if options.precision == "bfloat16" else torch.float32)
        operations = trainer.step_flops()

        def watch(step: StepReport) -> None:
            if not ranks.is_first:
                return
            measured = "" if step.report is None else f", {step.report.greedy.emitted_per_step():.2f} emitted a step"
            rate = operations / step.step_seconds
            used = f"{rate / 1e9:.0f} GFLOP/s, {rate / peak:.0%} of the peak"
            bar(step.step / step.steps, f"step {step.step}, loss {step.loss:.3f}, {used}{measured}")
            if step.report is not None:
                plot_history(read_history(args.run / "history.jsonl"), args.run / "training.png")

        trainer.run(watch)
    ranks.leave()
    if not ranks.is_first:
        return
    history = read_history(args.run / "history.jsonl")
    checkpoint = args.run / "checkpoint"
    provenance = Provenance(
        command=without_folders(["slipstream", *sys.argv[1:]]),
        target=Path(settings.model.source).name,
        prompts=prompt_file(args.prompts, len(read_prompts(args.prompts))) if args.prompts else None,
        own_prompts=len(_own_prompts(args)),
        corpus={
            "answers": len(corpus),
            "answer_tokens": sum(corpus.answer_tokens(i) for i in range(len(corpus))),
        },
        training={**options.to_json(), "drafter": config.to_json()},
        seconds=history[-1]["seconds"],
        result=history[-1]["emitted_per_verify_step"],
        sampled_result=history[-1].get("sampled_emitted_per_verify_step", {}),
        versions=versions(),
        commit=commit(),
    )
    provenance.write(checkpoint / "provenance.json")
    parameters = sum(p.numel() for p in trainer.drafter.model.parameters())
    write_card(checkpoint / "README.md", provenance, parameters, args.licence)
    print(f"drafter written to {checkpoint}; serve it with --speculation.drafter {checkpoint}", file=sys.stderr)


def _drafter_to_train(
    args: argparse.Namespace, target: "TargetWeights", corpus: "Corpus"
) -> tuple["DrafterConfig", "torch.Tensor | None", tuple[int, ...]]:
    """The drafter's shape, its vocabulary, and the target's layers it is copied from: none when it has a checkpoint."""
    from drafter.align.initial import drafter_config, frequent_tokens
    from drafter.checkpoint import load_drafter

    if args.initial is not None:
        print(f"corpus: {len(corpus):,} answers; training goes on from {args.initial}", file=sys.stderr)
        initial = load_drafter(args.initial)
        return initial.model.config, initial.token_ids, ()
    total = target.config["num_hidden_layers"]
    copied = tuple(range(total - args.layers, total))
    config = drafter_config(
        target,
        copied_layers=copied,
        target_layer_ids=tuple(layer - 1 for layer in corpus.layers),
        block_size=args.block_size,
        draft_vocab_size=args.draft_vocabulary,
        mask_token_id=args.mask_token_id,
        markov_rank=args.markov_rank,
        plain_dflash=args.dflash,
    )
    if config.draft_vocab_size == config.vocab_size:
        return config, None, copied
    token_ids, covered = frequent_tokens(corpus, config.draft_vocab_size, config.vocab_size)
    print(f"corpus: {len(corpus):,} answers; draft vocabulary covers {covered:.1%} of its tokens", file=sys.stderr)
    return config, token_ids, copied


def _known_prompts(args: argparse.Namespace) -> list[Prompt] | None:
    """The prompts to answer, or ``None`` when the target has yet to write some."""
    if args.prompts is None and args.own_prompts is None and not _own_prompts_file(args).exists():
        raise InputError("prompts are needed: --prompts FILE, or --own-prompts N to let the target write them")
    given = _prompts_of_file(args)
    if args.own_prompts is None and args.prompts is not None:
        return given
    return [*given, *_own_prompts(args)] if _own_prompts_file(args).exists() else None


def _own_prompts(args: argparse.Namespace) -> list[Prompt]:
    """What the target wrote so far for this run, if it is to be used."""
    unused = args.own_prompts is None and args.prompts is not None
    return [] if unused or not _own_prompts_file(args).exists() else read_prompts(_own_prompts_file(args))


def _prompts_of_file(args: argparse.Namespace) -> list[Prompt]:
    if args.prompts is None:
        return []
    try:
        return read_prompts(args.prompts)
    except OSError as error:
        raise InputError(f"prompts cannot be read: {error}") from error


def _own_prompts_file(args: argparse.Namespace) -> Path:
    return Path(args.run) / "own-prompts.jsonl"


def _hidden_state_layers(args: argparse.Namespace, model: Path) -> tuple[int, ...]:
    """What to record: the layers that the drafter reads, and the last, for the target's own distribution."""
    from drafter.align.initial import spread_layer_ids
    from drafter.config import read_config

    total = read_target_config(model)["num_hidden_layers"]
    if args.initial is not None:
        read = read_config(args.initial).target_layer_ids
        return tuple(layer + 1 for layer in sorted({*read, total - 1}))
    chosen = tuple(sorted(args.target_layers or spread_layer_ids(total, _LAYERS_READ)))
    if chosen[-1] != total - 1 or chosen[0] < 0:
        raise InputError(
            f"--target-layers = {','.join(map(str, chosen))}: layers are 0 to {total - 1}, and the last must be among "
            "them: the target's own distribution is computed from it"
        )
    return tuple(layer + 1 for layer in chosen)


def _kv_cache_bytes(args: argparse.Namespace, settings: Settings, model: Path) -> int:
    """Pages for all requests in flight at their usual length, and at least for one of the greatest."""
    tokens = max(args.concurrency * (_TYPICAL_PROMPT + args.max_answer), 2 * _MAX_LEN)
    return int(tokens * kv_bytes_per_token(settings.model.dtype, read_target_config(model), None))


def _recorded_tokens(folder: Path) -> int:
    from drafter.align.corpus import Corpus, shard_paths

    if not shard_paths(folder):
        return 0
    corpus = Corpus(folder, ())
    return sum(corpus.answer_tokens(i) for i in range(len(corpus)))


def _counting(bar: ProgressBar, done: int, total: int, unit: str) -> Callable[[int], None]:
    """A callback that moves ``bar`` by what it is given."""
    started, before = time.monotonic(), done

    def tell(count: int) -> None:
        nonlocal done
        done += count
        rate = (done - before) / max(time.monotonic() - started, 1e-6)
        bar(min(done / total, 1.0), f"{done:,} of {total:,} {unit}, {rate:.0f} a second")

    return tell
