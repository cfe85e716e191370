"""``slipstream bench-kernels --kernel layer``: the layers of a whole verify step by number of tokens.

How much longer a step of several tokens takes than one of a single token is what speculation costs: it wins where it
has more tokens accepted than that.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.arguments import check_positive, whole_numbers
from bench.errors import BenchError
from bench.kernel_report import write_report
from bench.layer_report import LayerReport
from bench.layer_shape import DEFAULT_SHAPE, LayerShape, read_shape
from bench.linear_kernels import check_blocks, weight_formats
from bench.terminal import duration

__all__ = ["DEFAULTS", "add_arguments", "measure"]

_FORMATS = "q4_1,q8_0,float32,bfloat16"

DEFAULTS = {"tokens": "1,2,4,6,8,16,32,64", "context": 256, "model_config": None, "formats": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``--kernel layer`` alone."""
    group = parser.add_argument_group("decoder layers", f"and --page-size, and --formats, which is {_FORMATS} here")
    group.add_argument(
        "--tokens",
        default=DEFAULTS["tokens"],
        metavar="N,M",
        help="tokens of a verify step, all of one request; 1 is measured in any case; default %(default)s",
    )
    group.add_argument(
        "--context",
        type=int,
        default=DEFAULTS["context"],
        metavar="N",
        help="tokens before them; default %(default)s",
    )
    group.add_argument(
        "--model-config", metavar="PATH", help="config.json of a model, or its folder; default the default target's"
    )


def measure(args: argparse.Namespace, path: Path | None, cache_bytes: int | None, usual_bytes: int) -> LayerReport:
    """Measure what the flags say.

    Args:
        args: of a parser with all flags of the command; those that all kernels share have been checked.
        path: where the report is written, again after every round.
        cache_bytes: what the outermost caches hold, if known.
        usual_bytes: taken where it is not.

    Raises:
        BenchError: something about the flags is wrong, or results are.
    """
    tokens = whole_numbers("--tokens", args.tokens)
    tokens = tokens if 1 in tokens else (1, *tokens)
    for name in ("context", "page_size"):
        check_positive(name, getattr(args, name))
    formats = weight_formats(_FORMATS if args.formats is None else args.formats)
    shape = _shape(args.model_config, formats)

    import torch

    from bench.kernel_cases import common_facts, read_bandwidth, threads
    from bench.layer_cases import LayerCases, Steps, copies, fitting
    from bench.layer_sides import LayerSide, LibrarySide, OperatorSide
    from bench.linear_cases import measure_peak
    from bench.linear_products import find_libraries

    libraries, missing = find_libraries()
    baseline = LibrarySide(libraries[-1], shape)
    sides: Sequence[LayerSide] = [*(OperatorSide(name, shape) for name in formats), baseline]
    sides, left_out = fitting(sides, shape, cache_bytes or usual_bytes, args.max_gib * 2**30)
    if not sides:
        raise BenchError(f"no weights fit into --max-gib {args.max_gib:g}: {left_out[0].weights}: {left_out[0].reason}")
    with threads(args.threads or torch.get_num_threads()), torch.inference_mode():
        _say("measuring the memory and the arithmetic")
        bandwidth, peak = read_bandwidth(), measure_peak()
        report = LayerReport(
            **common_facts(args.repeats, bandwidth, cache_bytes),
            peak=peak,
            shape=shape,
            context=args.context,
            page_size=args.page_size,
            baseline=str(baseline),
            copies=copies(sides, shape, cache_bytes or usual_bytes),
            rounds=0,
            rows=(),
            left_out=tuple(left_out),
            missing_libraries=tuple(missing),
        )
        _say(f"packing {shape.layers} layers: {', '.join(side.name for side in sides)}")
        cases = LayerCases(sides, shape, Steps(shape, args.context, tokens, args.page_size), report.copies)
        differences = cases.differences()
        _say("warming up")
        cases.warm_up()
        rounds: list[list[float]] = []
        for seconds in cases.rounds(args.repeats):
            rounds.append(seconds)
            done = len(rounds)
            rows = cases.rows(rounds, bandwidth, peak, differences)
            report = replace(report, rows=rows, rounds=done, complete=done == args.repeats)
            if path:
                write_report(report, path)
            left = sum(map(sum, rounds)) / done * (args.repeats - done)
            _say(f"[{done:>{len(str(args.repeats))}}/{args.repeats}, {duration(left)} left]")
    return report


def _shape(model_config: str | None, formats: Sequence[str]) -> LayerShape:
    """The model's shape, if the operator can hold its weights in these formats."""
    shape = DEFAULT_SHAPE if model_config is None else read_shape(model_config)
    for weight in (*shape.weights, shape.head):
        check_blocks(formats, weight, f"--model-config {model_config}: a weight of {weight}")
    return shape


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
