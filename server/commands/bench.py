"""``slipstream bench``."""

import argparse

HOSTS_ENGINE = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    from bench.cli import add_arguments as add_bench_arguments

    add_bench_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit code."""
    from bench.cli import run as bench

    return bench(args)
