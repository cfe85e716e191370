"""The ``slipstream bench-kernels`` command: the CPU's operators beside what they replace.

The attention operator beside gathering the pages and SDPA is measured here, linear layers in ``linear_kernels``, whole
decoder layers in ``layer_kernels``.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.arguments import check_positive, output_file, whole_numbers
from bench.errors import BenchError
from bench.kernel_report import KernelReport, KernelShape, LeftOut, render_report, write_report
from bench.layer_kernels import DEFAULTS as LAYER_DEFAULTS
from bench.layer_kernels import add_arguments as add_layer_arguments
from bench.layer_kernels import measure as measure_layer
from bench.layer_report import render_layer_report
from bench.linear_kernels import DEFAULTS as LINEAR_DEFAULTS
from bench.linear_kernels import add_arguments as add_linear_arguments
from bench.linear_kernels import measure as measure_linear
from bench.linear_report import render_linear_report
from bench.machine import last_level_cache_bytes

__all__ = ["add_arguments", "run"]

_MISTAKE = 2
_DTYPES = ("float32", "bfloat16", "float16")
_USUAL_CACHE_BYTES = 64 * 2**20
"""Taken where the system does not say how large its caches are."""

_ATTENTION_DEFAULTS: dict[str, str | int] = {
    "contexts": "128,512,2048,8192",
    "requests": "1,4,32",
    "heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
    "slots": 5,
    "page_size": 32,
    "dtype": "float32",
}
_DEFAULTS: dict[str, Mapping[str, object]] = {
    "attention": _ATTENTION_DEFAULTS,
    "linear": LINEAR_DEFAULTS,
    "layer": LAYER_DEFAULTS | {"page_size": _ATTENTION_DEFAULTS["page_size"]},
}
"""Of the flags that do not go with every kernel, by the kernels that they go with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "--kernel", choices=list(_DEFAULTS), default="attention", help="what to measure; default %(default)s"
    )
    group = parser.add_argument_group("attention", "the default drafter's, unless told otherwise")
    for name, text, letters in (
        ("contexts", "tokens before each block", "N,M"),
        ("requests", "requests in a batch", "N,M"),
        ("heads", "heads of the queries", "N"),
        ("kv_heads", "heads of keys and values", "N"),
        ("head_dim", "numbers of one head", "N"),
        ("slots", "draft slots of each request", "N"),
        ("page_size", "tokens of one page", "N"),
    ):
        default = _ATTENTION_DEFAULTS[name]
        group.add_argument(
            _flag(name), type=type(default), default=default, metavar=letters, help=f"{text}; default %(default)s"
        )
    group.add_argument(
        "--dtype", choices=_DTYPES, default=_ATTENTION_DEFAULTS["dtype"], help="of everything; default %(default)s"
    )
    add_linear_arguments(parser)
    add_layer_arguments(parser)
    how = parser.add_argument_group("measurement")
    how.add_argument(
        "--max-gib",
        type=float,
        default=3.0,
        metavar="GIB",
        help="memory for pages or weights; cases that need more are left out; default %(default)g",
    )
    how.add_argument("--repeats", type=int, default=30, metavar="N", help="runs of each; default %(default)s")
    how.add_argument("--threads", type=int, metavar="N", help="threads of torch; default as many as it takes by itself")
    how.add_argument("--json", metavar="FILE", help="write a report there")


def run(args: argparse.Namespace) -> int:
    """Measure and print a table; returns the exit code: 0, or 2 for bad input.

    Args:
        args: of a parser that ``add_arguments`` was called with.
    """
    try:
        print(_report(args))
    except BenchError as error:
        print(f"slipstream: error: {error}", file=sys.stderr)
        return _MISTAKE
    return 0


def _report(args: argparse.Namespace) -> str:
    """Check the flags that all kernels share, measure, and render."""
    for name, default in (flag for defaults in _DEFAULTS.values() for flag in defaults.items()):
        kernels = [kernel for kernel, defaults in _DEFAULTS.items() if name in defaults]
        if args.kernel not in kernels and getattr(args, name) != default:
            raise BenchError(
                f"{_flag(name)} goes with --kernel {' or '.join(kernels)}, not with --kernel {args.kernel}"
            )
    check_positive("repeats", args.repeats)
    check_positive("max_gib", args.max_gib)
    if args.threads is not None:
        check_positive("threads", args.threads)
    path = output_file(args.json) if args.json else None
    if args.kernel == "linear":
        return render_linear_report(measure_linear(args, path, last_level_cache_bytes(), _USUAL_CACHE_BYTES))
    if args.kernel == "layer":
        return render_layer_report(measure_layer(args, path, last_level_cache_bytes(), _USUAL_CACHE_BYTES))
    return render_report(_measure(args, path))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _measure(args: argparse.Namespace, path: Path | None) -> KernelReport:
    shape = _shape(args)
    contexts, requests = whole_numbers("--contexts", args.contexts), whole_numbers("--requests", args.requests)
    cache_bytes = last_level_cache_bytes()
    cases = [(context, count) for context in contexts for count in requests]
    pages, cases, left_out = _fitting(shape, cases, args.max_gib, cache_bytes or _USUAL_CACHE_BYTES)

    import torch

    from bench.kernel_cases import PagePool, common_facts, measure_case, read_bandwidth, threads

    with threads(args.threads or torch.get_num_threads()):
        print("measuring the memory", file=sys.stderr, flush=True)
        bandwidth = read_bandwidth()
        report = KernelReport(
            **common_facts(args.repeats, bandwidth, cache_bytes),
            shape=shape,
            rows=(),
            left_out=tuple(left_out),
        )
        pool = PagePool(shape, pages)
        for number, (context, count) in enumerate(cases, start=1):
            print(f"[{number}/{len(cases)}]  context {context}, requests {count}", file=sys.stderr, flush=True)
            row = measure_case(shape, context, count, pool, args.repeats, bandwidth)
            report = replace(report, rows=(*report.rows, row), complete=number == len(cases))
            if path:
                write_report(report, path)
    return report


def _shape(args: argparse.Namespace) -> KernelShape:
    for name in ("heads", "kv_heads", "head_dim", "slots", "page_size"):
        check_positive(name, getattr(args, name))
    if args.heads % args.kv_heads:
        raise BenchError(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    return KernelShape(args.heads, args.kv_heads, args.head_dim, args.slots, args.page_size, args.dtype)


def _fitting(
    shape: KernelShape, cases: Sequence[tuple[int, int]], max_gib: float, cache_bytes: int
) -> tuple[int, list[tuple[int, int]], list[LeftOut]]:
    """How many pages are needed for the cases (context, requests) that fit into memory, those, and the others.

    There have to be pages for two batches, so that a run never gets those of the run before, and twice as many as
    the caches hold.
    """
    page_bytes, budget = shape.page_size * shape.token_bytes, int(max_gib * 2**30)
    least = -(-2 * cache_bytes // page_bytes)
    if least * page_bytes > budget:
        raise BenchError(
            f"--max-gib {max_gib:g} is too little: the caches hold {cache_bytes / 2**30:.3g} GiB, and twice as much "
            "is needed to be sure that pages are read from memory"
        )
    needed = {(context, count): 2 * count * shape.pages(context) for context, count in cases}
    fitting = [case for case in cases if needed[case] * page_bytes <= budget]
    left_out = [
        LeftOut(
            *case, f"two batches of pages are {needed[case] * page_bytes / 2**30:.3g} GiB, --max-gib is {max_gib:g}"
        )
        for case in cases
        if case not in fitting
    ]
    if not fitting:
        raise BenchError(f"no case fits into --max-gib {max_gib:g}: {left_out[0].reason}")
    return max(least, *(needed[case] for case in fitting)), fitting, left_out
