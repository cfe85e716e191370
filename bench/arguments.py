"""Checks of what the benchmarks' commands are given; every complaint is a ``BenchError`` that names the flag."""

import math
import os
from pathlib import Path

from bench.errors import BenchError

__all__ = ["check_positive", "existing_folder", "output_file", "whole_numbers"]


def check_positive(name: str, value: float) -> None:
    """Refuse numbers that are not finite and above 0.

    Args:
        name: of the flag, with underscores and without ``--``.
        value: what was given.
    """
    if not value > 0 or not math.isfinite(value):
        raise BenchError(f"--{name.replace('_', '-')} {value:g} is not above 0")


def whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """The numbers of a comma-separated list: whole, above 0, none twice.

    Args:
        flag: its name, with ``--``.
        text: what was given.
    """
    numbers = []
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < 1:
            raise BenchError(f'{flag} {text}: "{part.strip()}" is not a whole number above 0')
        numbers.append(int(part))
    if len(set(numbers)) < len(numbers):
        raise BenchError(f"{flag} {text}: a number is given twice")
    return tuple(numbers)


def output_file(text: str) -> Path:
    """The absolute path of a file that is to be written, in a folder where that is possible."""
    path = Path(text).expanduser().absolute()
    if path.is_dir():
        raise BenchError(f"the output {text} is a folder; name a file in it")
    existing_folder(str(path.parent))
    return path


def existing_folder(text: str) -> Path:
    """The absolute path of a folder that can be written to."""
    path = Path(text).expanduser().absolute()
    if not path.is_dir():
        raise BenchError(f"the folder {path} does not exist")
    if not os.access(path, os.W_OK | os.X_OK):
        raise BenchError(f"the folder {path} is not writable")
    return path
