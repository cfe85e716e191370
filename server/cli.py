"""The ``slipstream`` command.

Only the module of the command that is run is imported, and that module defers what is heavy, so that help and
mistakes are answered at once.
"""

import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from server.errors import ConfigError, SlipstreamError
from server.launcher import relaunch
from server.parser import Parser

COMMANDS = {
    "serve": "serve a model through the OpenAI API, with the drafter on",
    "align": "train a drafter for a target on the target's own answers",
    "bench": "measure decoding methods side by side over the same prompts",
    "bench-kernels": "measure the compiled kernels beside PyTorch's operators",
    "simulate": "replay recorded drafts under several policies, on the step times of any machine",
    "doctor": "say what was found on this machine and which code paths will be used",
}

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# By default Python looks for garbage every 700 objects: a fifth of the time that vLLM's imports take.
_COLLECTOR_THRESHOLDS = (100_000, 20, 50)


class Command(Protocol):
    """What a module of ``server.commands`` provides."""

    HOSTS_ENGINE: bool
    """Whether the process needs the engine's environment (``server.launcher``)."""

    add_arguments: Callable[[Parser], None]
    run: Callable[[Any], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments; by default those of the process, which may then be re-executed for the engine's sake.

    Returns:
        the exit code: 0, 2 for a mistake that the user can mend, 130 after an interrupt, or the command's own.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv, own_process=argv is None)
    except SlipstreamError as error:
        print(f"slipstream: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(argv: Sequence[str], own_process: bool) -> int:
    parser = Parser(
        prog="slipstream",
        description="Serves a language model faster and word for word the same, by drafting with a diffusion model.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parsers = parser.add_subparsers(metavar="COMMAND", dest="command")
    subparsers = {name: parsers.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    chosen = next((word for word in argv if not word.startswith("-")), None)
    command = _load(chosen) if chosen in COMMANDS else None
    if chosen and command:
        command.add_arguments(subparsers[chosen])
    args, unknown = parser.parse_known_args(argv)
    subparsers.get(args.command, parser).reject(unknown)
    if args.version:
        print(f"slipstream {version()}")
        return 0
    if command is None:
        raise ConfigError(f"a command is needed: {', '.join(COMMANDS)} (see slipstream --help)")
    if command.HOSTS_ENGINE and own_process:
        relaunch()
        gc.set_threshold(*_COLLECTOR_THRESHOLDS)
    return command.run(args)


def version() -> str:
    """The installed version of the distribution."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("slipstream")
    except PackageNotFoundError:
        return "(not installed)"


def _load(name: str) -> Command:
    return cast(Command, importlib.import_module(f"server.commands.{name.replace('-', '_')}"))


if __name__ == "__main__":
    sys.exit(main())
