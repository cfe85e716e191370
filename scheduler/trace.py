"""Traces of verified drafts: what was offered, what was verified, what was accepted; a JSON object a line; pure.

The first line is the header: ``schema``, ``version``, and the attributes of ``TraceHeader``. Every other line is one
draft, with the keys

    request   name of the request
    seconds   since the start of the trace
    context   tokens before the draft
    survival  per source, the estimated probability that draft tokens 0..k are all accepted; [] where it had none
    source    whose draft was verified, an index into the header's sources
    verified  its first draft tokens, which the target saw
    accepted  those of them that the target accepted, the first ones

A file whose writer was killed ends in half a line; that is an error for ``read_trace``, not something to guess about.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

SCHEMA = "slipstream-trace"
VERSION = 1

_BUFFER_BYTES = 1 << 16
_DIGITS = 6  # of probabilities and seconds


class TraceError(ValueError):
    """A trace cannot be written or read; the message is one line that names the file, and the line if there is one."""


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What a whole trace shares.

    Attributes:
        slots: longest draft, tokens.
        sources: names of the places that drafts come from, by the index that drafts use.
        target: name of the target model.
        drafter: name of the drafter; empty without one.
        policy: that chose what was verified. Only with one that verifies everything, outcomes are known to the end.
        settings: anything else about the recording, JSON values.
    """

    slots: int
    sources: tuple[str, ...]
    target: str
    drafter: str
    policy: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DraftRecord:
    """One draft and what became of it; see the module for the attributes."""

    request: str
    seconds: float
    context: int
    survival: tuple[tuple[float, ...], ...]
    source: int
    verified: int
    accepted: int

    @property
    def offered(self) -> int:
        """Draft tokens of the source that was verified."""
        return len(self.survival[self.source])

    @property
    def censored(self) -> bool:
        """Whether more tokens might have been accepted, had more been verified."""
        return self.accepted == self.verified < self.offered


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace that was read: drafts in the order of the file."""

    header: TraceHeader
    drafts: list[DraftRecord]

    @property
    def censored(self) -> int:
        """Drafts whose outcome is not known to the end."""
        return sum(draft.censored for draft in self.drafts)


class TraceWriter:
    """Appends drafts to a new file, through a buffer. A context manager; not safe for use by several threads.

    Args:
        path: must not exist yet.
        header: of the trace.

    Raises:
        TraceError: the file exists, or cannot be made.
    """

    def __init__(self, path: Path, header: TraceHeader):
        self._path = path
        try:
            self._file = path.open("x", encoding="utf-8", buffering=_BUFFER_BYTES)
            self._write({"schema": SCHEMA, "version": VERSION, **asdict(header)})
            self._file.flush()
        except FileExistsError:
            raise TraceError(f"{path} exists already; a trace is written to a new file") from None
        except OSError as error:
            raise TraceError(f"cannot write the trace {path}: {error.strerror}") from error

    def write(self, draft: DraftRecord) -> None:
        """Append a draft; it may stay in the buffer until ``close``.

        Raises:
            TraceError: the file cannot be written any further.
        """
        try:
            self._write(
                {
                    "request": draft.request,
                    "seconds": round(draft.seconds, _DIGITS),
                    "context": draft.context,
                    "survival": [[round(p, _DIGITS) for p in survival] for survival in draft.survival],
                    "source": draft.source,
                    "verified": draft.verified,
                    "accepted": draft.accepted,
                }
            )
        except OSError as error:
            raise TraceError(f"cannot write the trace {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Write what is left; may be called again.

        Raises:
            TraceError: it cannot be written.
        """
        try:
            self._file.close()
        except OSError as error:
            raise TraceError(f"cannot write the trace {self._path}: {error.strerror}") from error

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, plain: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(plain, separators=(",", ":"), allow_nan=False) + "\n")


def read_trace(path: Path) -> Trace:
    """Read a whole trace.

    Raises:
        TraceError: it cannot be read, is none, is of another version, ends early or holds what cannot be.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = enumerate(file, start=1)
            header = _header(path, next(lines, (1, ""))[1])
            return Trace(header, [_draft(path, number, line, header) for number, line in lines])
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is not a trace: it is not UTF-8 text") from error


def _header(path: Path, line: str) -> TraceHeader:
    if not line:
        raise TraceError(f"{path} is not a trace: it is empty, a header was expected")
    try:
        plain = json.loads(line)
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA:
        raise TraceError(f'{path}:1: not a trace: a JSON object with "schema": "{SCHEMA}" was expected')
    if plain.get("version") != VERSION:
        raise TraceError(f"{path}:1: version {plain.get('version')!r} of the trace format; version {VERSION} is read")
    where = f"{path}:1"
    sources = plain.get("sources")
    if not (isinstance(sources, list) and sources and all(isinstance(name, str) for name in sources)):
        raise TraceError(f"{where}: sources is {sources!r}; a list of names was expected")
    settings = plain.get("settings", {})
    if not isinstance(settings, dict):
        raise TraceError(f"{where}: settings is {settings!r}; an object was expected")
    target, drafter, policy = (_text(where, plain, name) for name in ("target", "drafter", "policy"))
    slots = _count(where, plain, "slots", 1)
    return TraceHeader(slots, tuple(sources), target, drafter, policy, settings)


def _draft(path: Path, number: int, line: str, header: TraceHeader) -> DraftRecord:
    where = f"{path}:{number}"
    if not line.endswith("\n"):
        raise TraceError(f"{where}: the file ends in the middle of this line; the trace was cut off here")
    try:
        plain = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise TraceError(f"{where}: a JSON object was expected, not {_shown(plain)}")
    request = _text(where, plain, "request")
    survival = _survival(where, plain.get("survival"), header)
    source = _count(where, plain, "source", 0, len(header.sources) - 1)
    verified = _count(where, plain, "verified", 0)
    if verified > len(survival[source]):
        raise TraceError(
            f"{where}: {verified} draft tokens verified of {len(survival[source])} from the {header.sources[source]}"
        )
    accepted = _count(where, plain, "accepted", 0)
    if accepted > verified:
        raise TraceError(f"{where}: {accepted} draft tokens accepted of {verified} verified")
    seconds = _number(plain.get("seconds"))
    if seconds is None or seconds < 0:
        raise TraceError(f"{where}: seconds is {_shown(plain.get('seconds'))}; a finite number from 0 was expected")
    return DraftRecord(request, seconds, _count(where, plain, "context", 0), survival, source, verified, accepted)


def _survival(where: str, plain: object, header: TraceHeader) -> tuple[tuple[float, ...], ...]:
    if not isinstance(plain, list) or len(plain) != len(header.sources):
        raise TraceError(
            f"{where}: survival is {_shown(plain)}; a list for each of {list(header.sources)} was expected"
        )
    return tuple(_falling(where, name, each, header.slots) for name, each in zip(header.sources, plain, strict=True))


def _falling(where: str, source: str, plain: object, slots: int) -> tuple[float, ...]:
    what = f"{where}: survival of the {source}"
    if not isinstance(plain, list):
        raise TraceError(f"{what} is {_shown(plain)}; a list of probabilities was expected")
    if len(plain) > slots:
        raise TraceError(f"{what} has {len(plain)} draft tokens; at most {slots} were expected")
    values = tuple(filter(_is_probability, map(_number, plain)))
    if len(values) < len(plain):
        wrong = next(value for value in plain if not _is_probability(_number(value)))
        raise TraceError(f"{what} has {_shown(wrong)}; a probability from 0 to 1 was expected")
    for before, after in pairwise(values):
        if after > before:
            raise TraceError(f"{what} rises from {before} to {after}; it can only fall along a draft")
    return values


def _text(where: str, plain: Mapping[str, object], name: str) -> str:
    value = plain.get(name)
    if not isinstance(value, str):
        raise TraceError(f"{where}: {name} is {_shown(value)}; a text was expected")
    return value


def _count(where: str, plain: Mapping[str, object], name: str, least: int, most: int | None = None) -> int:
    value = plain.get(name)
    if type(value) is not int or value < least or (most is not None and value > most):
        expected = f"from {least}" if most is None else f"from {least} to {most}"
        raise TraceError(f"{where}: {name} is {_shown(value)}; a whole number {expected} was expected")
    return value


def _number(value: object) -> float | None:
    """A finite number; ``None`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _is_probability(value: float | None) -> TypeGuard[float]:
    return value is not None and 0 <= value <= 1


def _shown(value: object) -> str:
    """A value for a message: what JSON calls it, and not all of a long one."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
