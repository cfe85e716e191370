"""``slipstream align``."""

import argparse
from pathlib import Path

from drafter.align.options import Objective
from server.flags import add_settings_flags

HOSTS_ENGINE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.usage = "slipstream align --run FOLDER [--prompts FILE] [--own-prompts N] [--steps N] ..."
    parser.add_argument("--run", required=True, type=Path, help="folder of the run; started again, it goes on there")
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument(
        "--prompts", type=Path, metavar="FILE", help='one JSON object a line: {"category": …, "prompt": …, "system": …}'
    )
    corpus.add_argument(
        "--own-prompts", type=int, metavar="N", help="let the target write N prompts itself, beside those of the file"
    )
    corpus.add_argument(
        "--follow-ups",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of conversations that the target goes on with by itself, 0 to 1 (%(default)s)",
    )
    corpus.add_argument("--answer-tokens", type=int, default=300_000, help="answer tokens to collect (%(default)s)")
    corpus.add_argument("--max-answer", type=int, default=192, help="longest answer, tokens (%(default)s)")
    corpus.add_argument("--concurrency", type=int, default=64, help="answers written at the same time (%(default)s)")
    drafter = parser.add_argument_group("drafter")
    drafter.add_argument(
        "--from",
        dest="initial",
        type=Path,
        metavar="FOLDER",
        help="checkpoint to train further; its shape holds, and the other flags of this group do not",
    )
    drafter.add_argument("--layers", type=int, default=2, help="decoder layers, copied from the target's last (2)")
    drafter.add_argument(
        "--target-layers",
        type=lambda text: tuple(int(word) for word in text.split(",")),
        metavar="I,J,…",
        help="layers of the target that it reads, from 0, the last layer among them (four spread evenly, and the last)",
    )
    drafter.add_argument("--block-size", type=int, default=5, help="draft tokens of a block (%(default)s)")
    drafter.add_argument("--draft-vocabulary", type=int, default=8192, help="tokens it can propose (%(default)s)")
    drafter.add_argument("--mask-token-id", type=int, default=4, help="embedding row of an unknown slot (%(default)s)")
    drafter.add_argument(
        "--markov-rank",
        type=int,
        default=64,
        metavar="N",
        help="of the head that looks one token back, 0: none (64)",
    )
    drafter.add_argument(
        "--dflash", action="store_true", help="DFlash's own scheme, which vLLM serves too: no Markov head, all tokens"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=5000, help="optimiser steps (%(default)s)")
    training.add_argument("--learning-rate", type=float, default=8e-4, help="peak (%(default)s)")
    training.add_argument(
        "--objective",
        choices=[objective.value for objective in Objective],
        default=Objective.FALLING.value,
        help="what is minimised, see docs/align.md (%(default)s)",
    )
    training.add_argument(
        "--observed-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of blocks with some draft tokens given, 0 to 1: trains refinement passes (%(default)s)",
    )
    training.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of the matrix products (%(default)s)"
    )
    training.add_argument("--seed", type=int, default=0, help="of everything drawn at random (%(default)s)")
    training.add_argument("--licence", default="that of the target and of the prompts", help="for the model card")
    add_settings_flags(parser, sections=("model",))


def run(args: argparse.Namespace) -> int:
    """Collect, train and evaluate; returns the exit code."""
    from server.aligning import run as align

    return align(args)
