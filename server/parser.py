"""A command-line parser that answers a mistake with one line instead of a usage text."""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from server.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """``argparse`` without abbreviations, whose complaints are errors for the user."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def reject(self, unknown: Sequence[str]) -> None:
        """Complain about the first of the arguments that were left over.

        Raises:
            ConfigError: ``unknown`` is not empty.
        """
        if not unknown:
            return
        flag, _, value = unknown[0].partition("=")
        if not flag.startswith("-"):
            self.error(f"unexpected argument {flag!r}")
        if not value and len(unknown) > 1 and not unknown[1].startswith("-"):
            value = unknown[1]
        given = f" (value {value!r})" if value else ""
        self.error(f"unknown flag {flag}{given}{self._nearest(flag)}")

    def _nearest(self, flag: str) -> str:
        """The known flag most like ``flag``, which may lack its section or be written with dashes."""
        known = {name: action for name, action in self._option_string_actions.items() if name.startswith("--")}
        names = {_without_section(name): name for name in known} | {name: name for name in known}
        close = get_close_matches(flag.lower(), names, n=1, cutoff=0.6)
        if not close:
            return ""
        name = names[close[0]]
        return f"; nearest known flag: {name}, {(known[name].help or '').replace('%%', '%')}"


def _without_section(flag: str) -> str:
    """``--port`` for ``--server.port``, ``--no-enabled`` for ``--no-speculation.enabled``."""
    prefix = "--no-" if flag.startswith("--no-") else "--"
    return prefix + flag.removeprefix(prefix).split(".")[-1]
