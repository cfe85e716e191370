"""What ``slipstream simulate`` is given: its flags, and what is made of them."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from bench.arguments import check_positive, output_file, whole_numbers
from bench.errors import BenchError
from bench.figures import plot_file
from bench.simulate_costs import GpuCost, ReplayCost, Workload, find_gpu, read_cost
from bench.simulate_drafts import Drafts, drafts_of, truncate
from bench.simulate_policies import DEFAULT_TABLE, KNOWN, NamedPolicy, default_policies, find_policies
from bench.simulate_report import Load, TraceEntry
from scheduler.trace import Trace, read_trace

__all__ = ["SimulateOptions", "add_arguments", "read_options"]

_MOST_REQUESTS = 4096


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What was asked for.

    Attributes:
        drafts: to replay, of all traces.
        traces: where they are from.
        cost: the true cost of steps.
        policies: beside the oracles.
        loads: one after the other.
        max_requests: that run at once where they come at a rate.
        warm_up: steps that are not counted.
        steps, least_drafts: steps that are counted at least, and requests times steps.
        ramp: whether requests come one by one at first.
        noise: relative standard deviation of the step times that policies are told.
        objective: seconds per token that a request may take.
        seed: of everything.
        json, plot: files to write.
    """

    drafts: Drafts
    traces: tuple[TraceEntry, ...]
    cost: ReplayCost
    policies: tuple[NamedPolicy, ...]
    loads: tuple[Load, ...]
    max_requests: int
    warm_up: int
    steps: int
    least_drafts: int
    ramp: bool
    noise: float
    objective: float | None
    seed: int
    json: Path | None
    plot: Path | None

    def counted_steps(self, load: Load) -> int:
        """Steps of a load that are counted."""
        return max(self.steps, -(-self.least_drafts // (load.concurrency or 1)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    what = parser.add_argument_group("what is replayed")
    what.add_argument(
        "--trace", action="append", required=True, metavar="FILE", help="recorded drafts (docs/simulation.md); repeat"
    )
    what.add_argument(
        "--censored",
        action="store_true",
        help="replay a trace though some outcomes are not known to the end, with its drafts cut to what was verified",
    )
    what.add_argument(
        "--policies",
        metavar="A,B",
        help=f"{KNOWN}; default: all of them, with fixed:1 to fixed:7 and floor:0.12",
    )
    what.add_argument(
        "--table",
        default=DEFAULT_TABLE,
        metavar="N=K,M=L",
        help="K draft tokens from N requests on; default %(default)s",
    )
    what.add_argument(
        "--concurrency",
        default="1,4,16,64,256,1024,4096",
        metavar="N,M",
        help="requests that run all the time, 1 to 4096; default %(default)s",
    )
    what.add_argument("--rates", metavar="X,Y", help="besides, requests per second that come at random")
    what.add_argument(
        "--max-requests", type=int, default=256, metavar="N", help="that run at once with --rates; default %(default)s"
    )

    cost = parser.add_argument_group("what a step costs: one of the first two")
    cost.add_argument("--cost", metavar="FILE", help="a saved cost model, or a table of measured steps")
    cost.add_argument("--gpu", metavar="NAME", help="bounds by the data sheet of, for example, H100, A100 or RTX 4090")
    for flag, text in (
        ("--target-params", "with --gpu: weights of the target, in 10^9"),
        ("--drafter-params", "with --gpu: weights of the drafter, in 10^9"),
    ):
        cost.add_argument(flag, type=float, metavar="B", help=text)
    for flag, default, text in (
        ("--bytes-per-weight", 2.0, "of target and drafter"),
        ("--kv-bytes-per-token", 147_456.0, "keys and values of one context token; the default is Qwen3-8B's"),
        ("--efficiency", 0.7, "share of the data sheet's bandwidth and arithmetic that is reached"),
        ("--step-overhead-ms", 1.0, "of each step, beside both"),
        ("--draft-overhead-ms", 0.5, "of each run of the drafter"),
    ):
        cost.add_argument(
            flag, type=float, default=default, metavar="X", help=f"with --gpu: {text}; default {default:g}"
        )

    how = parser.add_argument_group("how")
    how.add_argument(
        "--warm-up", type=int, default=300, metavar="N", help="steps that are not counted; default %(default)s"
    )
    how.add_argument(
        "--steps", type=int, default=200, metavar="N", help="least steps that are counted; default %(default)s"
    )
    how.add_argument(
        "--drafts",
        type=int,
        default=4000,
        metavar="N",
        help="as many steps as it takes for so many drafts are counted, if those are more; default %(default)s",
    )
    how.add_argument(
        "--ramp", action="store_true", help="let the requests come one by one in the first half of --warm-up"
    )
    how.add_argument(
        "--noise",
        type=float,
        default=0.05,
        metavar="X",
        help="of the step times that policies see; default %(default)s",
    )
    how.add_argument("--objective-ms", type=float, metavar="MS", help="time per token that a request may take")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    how.add_argument("--json", metavar="FILE", help="write a report there")
    how.add_argument("--plot", metavar="FILE", help="draw speed and regret into this .svg or .html file")


def read_options(args: argparse.Namespace) -> SimulateOptions:
    """Check the flags and read the files.

    Raises:
        BenchError: a flag or a file is wrong.
        TraceError: a trace is.
    """
    for name in ("steps", "drafts", "max_requests", "efficiency", "bytes_per_weight"):
        check_positive(name, getattr(args, name))
    for name in ("warm_up", "seed", "noise", "kv_bytes_per_token", "step_overhead_ms", "draft_overhead_ms"):
        if not 0 <= getattr(args, name) < math.inf:
            raise BenchError(f"--{name.replace('_', '-')} {getattr(args, name):g} is negative or not finite")
    if args.efficiency > 1:
        raise BenchError(f"--efficiency {args.efficiency:g} is more than all, 1")
    if args.objective_ms is not None:
        check_positive("objective_ms", args.objective_ms)
    loads = _loads(args)
    cost = _cost(args)
    plot = _plot(args.plot, loads) if args.plot else None
    json = output_file(args.json) if args.json else None
    named = [_read(Path(file).expanduser(), args.censored) for file in args.trace]
    drafts = drafts_of([(entry.file, trace) for entry, trace in named])
    return SimulateOptions(
        drafts=drafts,
        traces=tuple(entry for entry, _ in named),
        cost=cost,
        policies=find_policies(args.policies or default_policies(drafts.slots), drafts.slots, args.table),
        loads=loads,
        max_requests=args.max_requests,
        warm_up=args.warm_up,
        steps=args.steps,
        least_drafts=args.drafts,
        ramp=args.ramp,
        noise=args.noise,
        objective=None if args.objective_ms is None else args.objective_ms / 1000,
        seed=args.seed,
        json=json,
        plot=plot,
    )


def _loads(args: argparse.Namespace) -> tuple[Load, ...]:
    concurrencies = whole_numbers("--concurrency", args.concurrency) if args.concurrency.strip() else ()
    for name, requests in [*(("concurrency", each) for each in concurrencies), ("max-requests", args.max_requests)]:
        if requests > _MOST_REQUESTS:
            raise BenchError(f"--{name}: {requests} is more than {_MOST_REQUESTS}")
    loads = [Load(concurrency=each) for each in concurrencies]
    for part in args.rates.split(",") if args.rates else ():
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise BenchError(f'--rates {args.rates}: "{part.strip()}" is not a number above 0')
        loads.append(Load(rate=rate))
    if not loads:
        raise BenchError("--concurrency or --rates must name a load")
    return tuple(loads)


def _cost(args: argparse.Namespace) -> ReplayCost:
    if (args.cost is None) == (args.gpu is None):
        raise BenchError("either --cost or --gpu is needed, to say what a step costs")
    sizes = {"--target-params": args.target_params, "--drafter-params": args.drafter_params}
    if args.cost is not None:
        given = next((flag for flag, value in sizes.items() if value is not None), None)
        if given:
            raise BenchError(f"{given} goes with --gpu, not with --cost")
        return read_cost(Path(args.cost).expanduser())
    for flag, value in sizes.items():
        if value is None:
            raise BenchError(f"{flag} is needed with --gpu")
        check_positive(flag.removeprefix("--"), value)
    return GpuCost(
        find_gpu(args.gpu),
        Workload(
            target_params=args.target_params * 1e9,
            drafter_params=args.drafter_params * 1e9,
            bytes_per_weight=args.bytes_per_weight,
            kv_bytes_per_token=args.kv_bytes_per_token,
            efficiency=args.efficiency,
            step_overhead_seconds=args.step_overhead_ms / 1000,
            draft_overhead_seconds=args.draft_overhead_ms / 1000,
        ),
    )


def _plot(text: str, loads: tuple[Load, ...]) -> Path:
    if all(load.concurrency is None for load in loads):
        raise BenchError("--plot shows loads of --concurrency, and there are none")
    return plot_file("--plot", text)


def _read(path: Path, censored: bool) -> tuple[TraceEntry, Trace]:
    trace = read_trace(path)
    unknown = trace.censored
    if unknown and not censored:
        raise BenchError(
            f"{path}: of {unknown} of {len(trace.drafts)} drafts the outcome is not known to the end, because "
            f"{trace.header.policy} verified less than was offered; record with the policy fixed, or give --censored"
        )
    header, requests = trace.header, len({draft.request for draft in trace.drafts})
    entry = TraceEntry(path.name, header.target, header.drafter, header.policy, requests, len(trace.drafts), unknown)
    return entry, truncate(trace) if unknown else trace
