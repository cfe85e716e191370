"""``slipstream bench-kernels --kernel linear``: the CPU's operator for linear layers beside the libraries."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.arguments import whole_numbers
from bench.errors import BenchError
from bench.kernel_report import write_report
from bench.linear_report import LeftOutShape, LinearReport, LinearRow, Peak, WeightShape

if TYPE_CHECKING:
    from bench.linear_cases import Sides

__all__ = ["DEFAULTS", "add_arguments", "check_blocks", "measure", "weight_formats"]

# Weights of the default target, its layers stacked as vLLM stacks them, and one of a larger model.
_SHAPES = "960x576,576x576,3072x576,576x1536,49152x576,8192x2048"
_ROWS = "1,2,4,8,16,32,64"
_FORMATS = "float32,bfloat16,float16,int8,q8_0,q4_1"
_BLOCKED = {"q8_0": 32, "q4_1": 32}
"""Formats of which a row is blocks of so many numbers."""

DEFAULTS = {"shapes": _SHAPES, "rows": _ROWS, "formats": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``--kernel linear``."""
    group = parser.add_argument_group("linear layers")
    for name, text, letters in (
        ("shapes", "weights, outputs x inputs; default those of the default target and one more:", "NxK,NxK"),
        ("rows", "rows that are multiplied; default", "N,M"),
    ):
        group.add_argument(f"--{name}", default=DEFAULTS[name], metavar=letters, help=f"{text} %(default)s")
    group.add_argument(
        "--formats", metavar="NAME,NAME", help=f"the operator's formats of the weights; default {_FORMATS}"
    )


def measure(args: argparse.Namespace, path: Path | None, cache_bytes: int | None, usual_bytes: int) -> LinearReport:
    """Measure what the flags say.

    Args:
        args: of a parser with all flags of the command; those that all kernels share have been checked.
        path: where the report is written, again after every case.
        cache_bytes: what the outermost caches hold, if known.
        usual_bytes: taken where it is not.

    Raises:
        BenchError: something about the flags is wrong, or results are.
    """
    shapes, row_counts = _shapes(args.shapes), whole_numbers("--rows", args.rows)
    formats = weight_formats(_FORMATS if args.formats is None else args.formats)
    for shape in shapes:
        check_blocks(formats, shape, f"--shapes {shape}")

    import torch

    from bench.kernel_cases import common_facts, read_bandwidth, threads
    from bench.linear_cases import Sides, measure_peak
    from bench.linear_products import find_libraries

    libraries, missing = find_libraries()
    sides = Sides(formats, libraries, cache_bytes or usual_bytes)
    shapes, left_out = _fitting(shapes, sides, args.max_gib)
    with threads(args.threads or torch.get_num_threads()), torch.inference_mode():
        print("measuring the memory and the arithmetic", file=sys.stderr, flush=True)
        bandwidth, peak = read_bandwidth(), measure_peak()
        report = LinearReport(
            **common_facts(args.repeats, bandwidth, cache_bytes),
            peak=peak,
            rows=(),
            left_out=tuple(left_out),
            missing_libraries=tuple(missing),
        )
        total = len(shapes) * len(row_counts)
        for row in _measured(sides, shapes, row_counts, args.repeats, bandwidth, peak):
            report = replace(report, rows=(*report.rows, row), complete=len(report.rows) + 1 == total)
            if path:
                write_report(report, path)
    return report


def _measured(
    sides: "Sides",
    shapes: Sequence[WeightShape],
    row_counts: Sequence[int],
    repeats: int,
    bandwidth: float,
    peak: Peak,
) -> Iterator[LinearRow]:
    total, number = len(shapes) * len(row_counts), 0
    for shape in shapes:
        print(f"packing {shape}", file=sys.stderr, flush=True)
        weights = sides.weights(shape)
        differences = weights.differences(row_counts)
        for rows in row_counts:
            number += 1
            print(f"[{number}/{total}]  {shape}, {rows} row{'s' if rows > 1 else ''}", file=sys.stderr, flush=True)
            yield weights.measure(rows, repeats, bandwidth, peak, differences)
        del weights  # before those of the next shape are made


def _fitting(
    shapes: Sequence[WeightShape], sides: "Sides", max_gib: float
) -> tuple[list[WeightShape], list[LeftOutShape]]:
    """Shapes whose copies fit into memory, and the others."""
    needed = {shape: sides.memory_bytes(shape) for shape in shapes}
    fitting = [shape for shape in shapes if needed[shape] <= max_gib * 2**30]
    left_out = [
        LeftOutShape(shape, f"all copies of it are {needed[shape] / 2**30:.3g} GiB, --max-gib is {max_gib:g}")
        for shape in shapes
        if shape not in fitting
    ]
    if not fitting:
        raise BenchError(f"no weight fits into --max-gib {max_gib:g}: {left_out[0].reason}")
    return fitting, left_out


def _shapes(text: str) -> Sequence[WeightShape]:
    shapes = []
    for part in text.split(","):
        sizes = part.strip().split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise BenchError(f'--shapes {text}: "{part.strip()}" is not OUTPUTSxINPUTS, like 576x1536')
        shapes.append(WeightShape(int(sizes[0]), int(sizes[1])))
    if len(set(shapes)) < len(shapes):
        raise BenchError(f"--shapes {text}: a shape is given twice")
    return shapes


def weight_formats(text: str) -> Sequence[str]:
    """The formats of a comma-separated list, none twice."""
    formats = [part.strip() for part in text.split(",")]
    if unknown := [name for name in formats if name not in _FORMATS.split(",")]:
        raise BenchError(f'--formats {text}: "{unknown[0]}" is none of {_FORMATS.replace(",", ", ")}')
    if len(set(formats)) < len(formats):
        raise BenchError(f"--formats {text}: a format is given twice")
    return formats


def check_blocks(formats: Sequence[str], shape: WeightShape, origin: str) -> None:
    """Refuse a weight whose rows are no whole blocks of a format.

    Args:
        formats: their names.
        shape: of the weight.
        origin: what the user gave that says so.
    """
    for name in formats:
        if name in _BLOCKED and shape.in_features % _BLOCKED[name]:
            raise BenchError(
                f"{origin} with --formats {name}: inputs are {shape.in_features}, expected a multiple of "
                f"{_BLOCKED[name]}"
            )
