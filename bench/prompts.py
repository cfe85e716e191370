"""Prompt files: one JSON object a line, ``{"category": …, "prompt": …}``; further keys are left to later readers."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from bench.errors import BenchError

__all__ = ["ALL_CATEGORIES", "PromptFile", "load_prompts"]

ALL_CATEGORIES = "all"
"""The name of the rows that sum up all categories; no category of a prompt file may be called so."""

_MIXED = "mixed"  # the one category that is left when prompts of all categories run at the same time


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of one report.

    Attributes:
        name: of the file, without its folder.
        sha256: digest of the whole file, hexadecimal, so that two reports can be known to share their prompts.
        categories: the prompts of each category, categories and prompts in the order of the file.
    """

    name: str
    sha256: str
    categories: Mapping[str, tuple[str, ...]]

    def mixed(self) -> "PromptFile":
        """The same prompts as one category, taken from the categories in turn."""
        turns = zip_longest(*self.categories.values())
        prompts = tuple(prompt for turn in turns for prompt in turn if prompt is not None)
        return replace(self, categories={_MIXED: prompts})

    def check_fills(self, concurrency: int) -> None:
        """See that a load of any category can keep so many requests in flight.

        Raises:
            BenchError: a category has fewer prompts.
        """
        category, prompts = min(self.categories.items(), key=lambda item: len(item[1]))
        if len(prompts) < concurrency:
            raise BenchError(
                f"--concurrency {concurrency}: of category {category} there are only {len(prompts)} prompts, so no "
                "more requests than that would be in flight; give more prompts, or mix the categories with --mixed"
            )


def load_prompts(path: Path, limit: int | None = None) -> PromptFile:
    """Read a prompt file.

    Args:
        path: the file, UTF-8; blank lines are skipped.
        limit: keep the first ``limit`` prompts of each category; ``None`` keeps all.

    Raises:
        BenchError: the file cannot be read, has a broken line (named as file:line), or has no prompts.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise BenchError(f"cannot read the prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BenchError(f"{path}:{line}: not UTF-8 text") from error

    categories: dict[str, list[str]] = {}
    for number, line_text in enumerate(text.split("\n"), start=1):
        if not line_text.strip():
            continue
        category, prompt = _parse_line(line_text, f"{path}:{number}")
        kept = categories.setdefault(category, [])
        if limit is None or len(kept) < limit:
            kept.append(prompt)
    if not categories:
        raise BenchError(f"the prompt file {path} has no prompts")
    return PromptFile(
        name=path.name,
        sha256=hashlib.sha256(raw).hexdigest(),
        categories={category: tuple(prompts) for category, prompts in categories.items()},
    )


def _parse_line(text: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchError(f"{where}: not a JSON object: {error.msg} at column {error.colno}") from error
    if not isinstance(entry, dict):
        raise BenchError(f"{where}: expected a JSON object, got {type(entry).__name__}")
    category, prompt = (_text_field(entry, key, where) for key in ("category", "prompt"))
    if category == ALL_CATEGORIES:
        raise BenchError(f'{where}: the category "{ALL_CATEGORIES}" is reserved for the sum over all categories')
    return category, prompt


def _text_field(entry: Mapping[str, object], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        given = "missing" if key not in entry else json.dumps(value, ensure_ascii=False)
        raise BenchError(f'{where}: "{key}" must be a non-empty string, it is {given}')
    return value
