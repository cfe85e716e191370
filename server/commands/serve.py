"""``slipstream serve``."""

import argparse

from server.flags import add_settings_flags, settings_of, settings_usage

HOSTS_ENGINE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.usage = settings_usage("serve")
    add_settings_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; returns the exit code."""
    settings = settings_of(args)
    from server.serving import serve

    return serve(settings)
