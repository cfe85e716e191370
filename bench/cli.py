"""The ``slipstream bench`` command: several ways of decoding one model, side by side, over the same prompts."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from bench.arguments import check_positive, existing_folder, output_file, whole_numbers
from bench.errors import BenchError
from bench.figures import plot_file
from bench.methods import METHODS, EngineSettings, Method, find_methods
from bench.plot import draw_report
from bench.prompts import load_prompts
from bench.report import Report
from bench.runner import BenchOptions, run_benchmark
from bench.servers import server_methods
from bench.terminal import make_display, render_settings, render_table
from bench.variants import variant_methods

__all__ = ["DEFAULT_MODEL", "add_arguments", "run"]

DEFAULT_MODEL = "smollm2-135m-instruct"

_MISTAKE = 2
_SOMETHING_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    shared = EngineSettings(model=Path())
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--methods",
        default=",".join(METHODS),
        metavar="A,B",
        help="; ".join(f"{method.name}: {method.summary}" for method in METHODS.values()) + "; default %(default)s",
    )
    what.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:SETTINGS",
        help="one more method: our engine with drafting on and these settings, as in "
        '--variant "short drafts:speculation.max_draft_tokens=2,speculation.survival_floor=0"; may be repeated',
    )
    what.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="NAME=SERVER",
        help="one more method: another OpenAI-compatible server, which runs already (NAME=http://127.0.0.1:8081) or is "
        'started by its own command line ("NAME=llama-server -m model.gguf --port {port}"); may be repeated',
    )
    what.add_argument(
        "--prompts", required=True, metavar="FILE", help='one JSON object a line: {"category": ..., "prompt": ...}'
    )
    what.add_argument("--limit", type=int, metavar="N", help="only the first N prompts of each category")
    what.add_argument(
        "--mixed", action="store_true", help="run prompts of all categories together; by default one after the other"
    )
    what.add_argument(
        "--concurrency", default="1,4", metavar="N,M", help="requests in flight at the same time; default %(default)s"
    )
    what.add_argument("--max-tokens", type=int, default=128, metavar="N", help="longest answer; default %(default)s")
    what.add_argument(
        "--shortest",
        type=int,
        metavar="N",
        help="limit the answers to N tokens up to --max-tokens, spread evenly over the prompts, so that requests do "
        "not begin and end in step; by default all have the same limit",
    )
    what.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy answers")
    what.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="how often the methods alternate; default %(default)s"
    )
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of the order and of sampling; default 0")
    what.add_argument(
        "--prefix-cache",
        choices=("cold", "warm"),
        default="cold",
        help="cold: every load processes its prompts anew; warm: only the first one does; default %(default)s",
    )
    what.add_argument(
        "--output", default="report.json", metavar="FILE", help="where the report goes; default %(default)s"
    )
    what.add_argument("--plot", metavar="FILE", help="draw speed by concurrency into this .svg or .html file")

    engine = parser.add_argument_group("the engines, all alike")
    engine.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="PATH", help="folder or known name of the target; default %(default)s"
    )
    engine.add_argument("--dtype", default=shared.dtype, help="format of weights and arithmetic; default %(default)s")
    for flag, default, text in (
        ("--max-model-len", shared.max_model_len, "longest prompt and answer together, tokens"),
        ("--max-num-seqs", shared.max_num_seqs, "requests that run at the same time"),
        ("--max-num-batched-tokens", shared.max_num_batched_tokens, "tokens of one step"),
        ("--block-size", shared.block_size, "tokens of one KV page"),
    ):
        engine.add_argument(flag, type=int, default=default, metavar="N", help=f"{text}; default {default}")
    engine.add_argument(
        "--kv-cache-gib",
        type=float,
        default=shared.kv_cache_gib,
        metavar="GIB",
        help="memory for KV pages of each engine; default %(default)s",
    )
    engine.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="one more argument for our servers, as in --engine-arg=--speculation.max_draft_tokens=4; may be repeated",
    )
    engine.add_argument(
        "--vllm-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="one more argument for unmodified vLLM, as in --vllm-arg=--no-enforce-eager; may be repeated",
    )
    engine.add_argument(
        "--startup-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long an engine may take to become ready; default %(default)g",
    )
    engine.add_argument("--logs", metavar="FOLDER", help="keep the engines' logs in this folder")


def run(args: argparse.Namespace, methods: Mapping[str, Method] = METHODS) -> int:
    """Measure, write the report and print its table.

    Args:
        args: of a parser that ``add_arguments`` was called with.
        methods: the methods that may be asked for.

    Returns:
        0, 1 when something could not be measured (the report says what), 2 for bad input, or 128 plus the number of
        the signal that ended it early.
    """
    try:
        plot = plot_file("--plot", args.plot) if args.plot else None
        options = _options(args, methods)
        display = make_display()
        try:
            outcome = run_benchmark(options, display)
        finally:
            display.close()
        _print_report(outcome.report, options.output)
        if plot and outcome.report.rows:
            draw_report(outcome.report, plot)
    except BenchError as error:
        print(f"slipstream: error: {error}", file=sys.stderr)
        return _MISTAKE
    if outcome.interrupted_by is not None:
        return 128 + outcome.interrupted_by
    return _SOMETHING_FAILED if outcome.report.failures else 0


def _options(args: argparse.Namespace, methods: Mapping[str, Method]) -> BenchOptions:
    """Check everything that can be checked before minutes are spent on starting engines."""
    variants = variant_methods(args.variant, methods)
    servers = server_methods(args.server, {*methods, *(variant.name for variant in variants)})
    others = (*variants, *servers)
    chosen = find_methods(args.methods, methods) if args.methods.strip() or not others else ()
    concurrencies = whole_numbers("--concurrency", args.concurrency)
    for name in (
        *("max_tokens", "repeats", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"),
        *("kv_cache_gib", "startup_timeout"),
    ):
        check_positive(name, getattr(args, name))
    if args.limit is not None:
        check_positive("limit", args.limit)
    if args.shortest is not None and not 1 <= args.shortest <= args.max_tokens:
        raise BenchError(f"--shortest {args.shortest} is not from 1 to --max-tokens {args.max_tokens}")
    if not 0 <= args.temperature <= 2:
        raise BenchError(f"--temperature {args.temperature:g} is not between 0 and 2")
    if args.seed < 0:
        raise BenchError(f"--seed {args.seed} is negative")
    prompts = load_prompts(Path(args.prompts).expanduser(), args.limit)
    if args.mixed:
        prompts = prompts.mixed()
    prompts.check_fills(max(concurrencies))
    return BenchOptions(
        methods=(*chosen, *others),
        prompts=prompts,
        concurrencies=concurrencies,
        max_tokens=args.max_tokens,
        shortest=args.shortest,
        temperature=args.temperature,
        repeats=args.repeats,
        seed=args.seed,
        prefix_cache=args.prefix_cache,
        output=output_file(args.output),
        logs=existing_folder(args.logs) if args.logs else None,
        startup_timeout=args.startup_timeout,
        command=_recorded_command(args.prompts, dict(zip(args.server, servers, strict=True))),
        engine=EngineSettings(  # last: it may fetch and convert the model
            model=_model_folder(args.model),
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            block_size=args.block_size,
            kv_cache_gib=args.kv_cache_gib,
            vllm_args=tuple(args.vllm_arg),
            engine_args=tuple(args.engine_arg),
        ),
    )


def _recorded_command(prompts: str, servers: Mapping[str, Method]) -> tuple[str, ...]:
    """The command line for the report, which is published: without the folders of this machine's files.

    Args:
        prompts: the prompt file as it was given.
        servers: the methods of ``--server`` flags by what was given.
    """
    plain: dict[str, str] = {}
    for flag, given, shown in (
        ("--prompts", prompts, Path(prompts).name),
        *(("--server", given, f"{method.name}={method.external}") for given, method in servers.items()),
    ):
        plain |= {given: shown, f"{flag}={given}": f"{flag}={shown}"}
    return (Path(sys.argv[0]).name, *(plain.get(word, word) for word in sys.argv[1:]))


def _model_folder(source: str) -> Path:
    """The folder of the target, which the model store fetches and converts if its name is known and it is new."""
    from server.config import DEFAULT_PRESET, load_settings
    from server.errors import SlipstreamError
    from server.model_store import resolve_model
    from server.progress import ProgressBar

    try:
        cache_dir = load_settings(DEFAULT_PRESET, os.environ, {}).model.cache_dir
        with ProgressBar(f"model {source}") as bar:
            return resolve_model(source, cache_dir, bar).resolve()
    except SlipstreamError as error:
        raise BenchError(str(error)) from error


def _print_report(report: Report, output: Path) -> None:
    if report.rows:
        print(render_table(report.rows))
        print(render_settings(report.methods), end="")
    for failure in report.failures:
        print(f"failed: {failure.method} ({failure.stage}): {failure.message}", file=sys.stderr)
        for line in failure.log_tail:
            print(f"    {line}", file=sys.stderr)
    state = "report" if report.complete else "partial report"
    print(f"{state} written to {output}", file=sys.stderr)
