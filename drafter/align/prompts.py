"""Prompts for alignment: from a JSONL file, or written by the target itself."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user turn, with the system prompt that stands before it, if there is one.

    ``category`` is a free label that reports are broken down by.
    """

    category: str
    text: str
    system: str | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation up to where the assistant speaks."""
        return (*opening(self.system), Turn("user", self.text))


def opening(system: str | None) -> tuple[Turn, ...]:
    """How a conversation under a system prompt begins, or without one."""
    return () if system is None else (Turn("system", system),)


# What people use a model for, as the system prompts that get the target to write such user turns (Magpie,
# arXiv 2406.08464). They stay with the prompt, so that answers are given under many of them.
OWN_SUBJECTS: tuple[tuple[str, str | None], ...] = (
    ("chat", None),
    ("chat", "You are a friendly assistant who gives advice on everyday life."),
    ("code", "You are a programming assistant. The user asks for Python functions, fixes and explanations."),
    ("math", "You are a patient teacher of mathematics. The user brings word problems with numbers."),
    ("extraction", "The user gives a short text and asks you to extract names, dates or facts from it as a list."),
    ("translation", "You translate sentences between languages. The user gives a sentence and names a language."),
    ("summarization", "You summarise texts. The user gives a paragraph and asks for a summary of it."),
    ("writing", "You write e-mails, stories and notes for the user."),
    ("qa", "You answer questions about science, history and geography in short."),
)


def read_prompts(path: Path) -> list[Prompt]:
    """Read ``{"category": …, "prompt": …}`` lines, ``"system"`` beside them if wanted; blank lines are skipped.

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
            category, text, system = item["category"], item["prompt"], item.get("system")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path}:{number}: expected {{"category": …, "prompt": …}}, got {line[:80]!r}') from error
        if not _is_text(category) or not _is_text(text) or "/" in category:
            raise ValueError(f"{path}:{number}: category and prompt must be non-empty strings, category without '/'")
        if system is not None and not _is_text(system):
            raise ValueError(f"{path}:{number}: system must be a non-empty string, not {system!r}")
        prompts.append(Prompt(category, text, system))
    return prompts


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts so that ``read_prompts`` reads them back; the file appears complete or not at all."""
    unfinished = path.with_suffix(".partial")
    unfinished.write_text("".join(map(_line, prompts)), encoding="utf-8")
    os.replace(unfinished, path)


def _line(prompt: Prompt) -> str:
    item = {"category": prompt.category, "prompt": prompt.text}
    if prompt.system is not None:
        item["system"] = prompt.system
    return json.dumps(item, ensure_ascii=False) + "\n"


def distinct(prompts: Sequence[Prompt]) -> list[int]:
    """Indices of the first of all prompts that ask the same: that differ in case and spaces at most."""
    first: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(same_text(prompt.text), index)
    return list(first.values())


def same_text(text: str) -> str:
    """What texts have in common that differ in case and spaces only."""
    return " ".join(text.casefold().split())


def usable_turn(text: str) -> str | None:
    """A user turn that the target wrote, cleaned, or ``None`` when it is of no use as a prompt.

    Dropped are turns too short to ask anything, and degenerate ones that repeat themselves.
    """
    text = text.strip()
    words = text.split()
    if len(words) < 3 or len(set(words)) < 0.4 * len(words):
        return None
    return text
