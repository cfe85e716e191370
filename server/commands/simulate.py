"""``slipstream simulate``."""

import argparse

HOSTS_ENGINE = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    from bench.simulate_options import add_arguments as add_simulate_arguments

    add_simulate_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Simulate and report; returns the exit code."""
    from bench.simulate import run as simulate

    return simulate(args)
