"""``slipstream align``."""

import argparse

from server.flags import add_settings_flags

HOSTS_ENGINE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_settings_flags(parser, sections=("model", "engine", "speculation"))


def run(args: argparse.Namespace) -> int:
    """Collect, train and evaluate; returns the exit code."""
    from server.aligning import run as align

    return align(args)
