"""Prompts for alignment: from a JSONL file, or written by the target itself."""

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user turn. ``category`` is a free label that reports are broken down by."""

    category: str
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """Read ``{"category": …, "prompt": …}`` lines; blank lines are skipped.

    Raises:
        ValueError: a line is not such an object; the message names file and line.
        OSError: the file cannot be read.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            category, text = item["category"], item["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number}: expected {{"category": …, "prompt": …}}, got {line[:80]!r}') from error
        if not _is_text(category) or not _is_text(text) or "/" in category:
            raise ValueError(f"{path}:{number}: category and prompt must be non-empty strings, category without '/'")
        prompts.append(Prompt(category, text))
    return prompts


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def write_prompts(path: Path, prompts: list[Prompt]) -> None:
    """Write prompts so that ``read_prompts`` reads them back; the file appears complete or not at all."""
    lines = [json.dumps({"category": p.category, "prompt": p.text}, ensure_ascii=False) + "\n" for p in prompts]
    unfinished = path.with_suffix(".partial")
    unfinished.write_text("".join(lines), encoding="utf-8")
    os.replace(unfinished, path)


def usable_turn(text: str) -> str | None:
    """A user turn that the target wrote, cleaned, or ``None`` when it is of no use as a prompt.

    Dropped are turns too short to ask anything, and degenerate ones that repeat themselves.
    """
    text = text.strip()
    words = text.split()
    if len(words) < 3 or len(set(words)) < 0.4 * len(words):
        return None
    return text
