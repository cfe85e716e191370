"""``slipstream bench-kernels``."""

import argparse

HOSTS_ENGINE = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    from bench.kernels import add_arguments as add_kernel_arguments

    add_kernel_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit code."""
    from bench.kernels import run as bench_kernels

    return bench_kernels(args)
