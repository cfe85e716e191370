"""The report of a benchmark: a JSON file with a public, stable schema.

The file holds one object, ``Report``, whose parts are the dataclasses of this module, ``bench.machine.Machine``
among them; every attribute is a key of the same name. ``schema_version`` grows when a key changes its meaning or
goes away; new keys may appear without that, and readers ignore keys that they do not know. Times are in seconds
(names that end in ``_seconds``), ratios have no unit, ``null`` means unknown or not applicable.

A report is written again after every measured cell, always whole and to a temporary file that then takes the place of
the old one: whatever interrupts a benchmark leaves a valid report behind, with ``"complete": false``.

How to read the numbers:

- Rows are one for each method, concurrency and category, and one more with the category ``all``. That one sums up
  only the repeats in which every category was measured, so that it never compares different mixes of prompts.
- ``tokens_per_second`` is output tokens per second of wall time of the whole load, prompt processing included.
- Repeats are paired: ``speed_vs_ar`` and ``speed_vs_vllm`` are medians of the ratios within each repeat, so what
  slows the machine down for minutes does not enter them. Both engines of a ratio hold the weights in the row's
  ``weight_format``, except where that is ``null``: a server that is not ours chose its own.
- Time to first token depends on prefix caching. With ``"prefix_cache": "cold"`` every load carries its own
  ``cache_salt``, which vLLM mixes into the keys of its cache, and ``"cache_prompt": false``, which llama.cpp
  understands, so that prompts are really processed each time. With ``"warm"`` (or a server that ignores both) all
  repeats but the first find their prompts cached; that makes prompt processing look nearly free.
- ``identical_to_ar`` is about greedy texts (a server that is not ours rounds in other places, so that its texts may
  differ without being wrong); ``repeatable_fraction`` tells how often a method gives the same text as
  itself from one repeat to the next, the yardstick for it: batches of other shapes round differently.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from bench.errors import BenchError, Stage
from bench.json_file import write_json
from bench.machine import Machine

__all__ = [
    "SCHEMA_VERSION",
    "Failure",
    "MethodEntry",
    "PrefixCache",
    "Report",
    "Row",
    "Settings",
    "read_report",
    "write_report",
]

SCHEMA_VERSION = 1

PrefixCache = Literal["cold", "warm"]

_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for; equal for all methods.

    Attributes:
        model: folder of the target.
        dtype, max_model_len, max_num_seqs, max_num_batched_tokens, block_size, kv_cache_gib, vllm_args, engine_args:
            see ``bench.methods.EngineSettings``.
        prompts, prompts_sha256: name of the prompt file, without its folder, and its digest.
        prompts_per_category: how many prompts of each category were used.
        concurrencies: requests in flight at the same time, one block of rows each.
        max_tokens: longest answer, tokens.
        temperature: 0 for greedy answers.
        repeats: how often everything was measured.
        seed: of the measuring order, and of the requests where the temperature is above 0.
        prefix_cache: ``cold`` or ``warm``, see above.
        shortest: see ``bench.client.Load``.
    """

    model: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_gib: float
    vllm_args: tuple[str, ...]
    engine_args: tuple[str, ...]
    prompts: str
    prompts_sha256: str
    prompts_per_category: Mapping[str, int]
    concurrencies: tuple[int, ...]
    max_tokens: int
    temperature: float
    repeats: int
    seed: int
    prefix_cache: PrefixCache
    shortest: int | None = None


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """A method as it ran.

    Attributes:
        name, summary: of the method.
        command: its engine's command line.
        environment: variables that were added for it, and inherited ones that engines listen to; no secrets.
        startup_seconds: from starting the process to its being ready, without warm-up; ``null`` if it never was, or
            ran before.
        settings: of a variant, what makes it differ from ``slipstream``, by ``section.name``; empty for others.
        external: of a server that is not ours, its address (``command`` is empty then) or the command line that
            starts it, with ``{port}`` in it; ``null`` for ours. The report's ``settings`` of engines do not apply to
            it.
    """

    name: str
    summary: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    startup_seconds: float | None
    settings: Mapping[str, str] = field(default_factory=dict)
    external: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one concurrency over the prompts of one category (or of ``all``).

    Attributes:
        method, concurrency, category: what the row is about.
        weight_format: the format that the engine held the weights in; ``null`` for a server that is not ours.
        repeats: how many repeats the row is made of.
        requests, failed_requests: answered ones and others, over all repeats.
        prompt_tokens, output_tokens: of the answered requests, over all repeats.
        tokens_per_second, tokens_per_second_spread: median over the repeats; smallest and largest.
        tokens_per_second_by_repeat: one figure a repeat, in their order.
        time_to_first_token_p50_seconds, …_p95_…: over all answered requests of all repeats; as is
        time_per_output_token_p50_seconds, …_p95_…: (last token - first token) / (tokens - 1) of each request; and
        end_to_end_p50_seconds, …_p95_…: from sending the request to its last token.
        emitted_per_verify_step: output tokens for each forward pass of the target that a request took part in after
            its prompt; 1.0 by definition for methods without drafts.
        drafted_tokens, verified_tokens, accepted_tokens: counters of the server over the row's loads.
        identical_to_ar: all greedy texts equal those of ``ar`` for the same prompt, concurrency and repeat (as those
            of ``ar`` itself do trivially); ``null`` without ``ar`` or above temperature 0.
        identical_fraction: the share of the texts that do.
        repeatable_fraction: the share of the prompts that got the same greedy text in all repeats.
        speed_vs_ar, speed_vs_vllm: median over the repeats of the ratio of tokens per second; the spreads are the
            smallest and the largest ratio.
    """

    method: str
    concurrency: int
    category: str
    weight_format: str | None
    repeats: int
    requests: int
    failed_requests: int
    prompt_tokens: int
    output_tokens: int
    tokens_per_second: float
    tokens_per_second_spread: tuple[float, float]
    tokens_per_second_by_repeat: tuple[float, ...]
    time_to_first_token_p50_seconds: float | None
    time_to_first_token_p95_seconds: float | None
    time_per_output_token_p50_seconds: float | None
    time_per_output_token_p95_seconds: float | None
    end_to_end_p50_seconds: float | None
    end_to_end_p95_seconds: float | None
    emitted_per_verify_step: float | None
    drafted_tokens: int | None
    verified_tokens: int | None
    accepted_tokens: int | None
    identical_to_ar: bool | None
    identical_fraction: float | None
    repeatable_fraction: float | None
    speed_vs_ar: float | None
    speed_vs_ar_spread: tuple[float, float] | None
    speed_vs_vllm: float | None
    speed_vs_vllm_spread: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that did not work; the rest of the report stands.

    Attributes:
        method: whose engine it was.
        stage: ``start``, ``warm-up`` or ``measure`` (the method is not measured any further), or ``request`` (single
            requests failed).
        message: one line.
        log_tail: the last lines of the engine's log, oldest first.
    """

    method: str
    stage: Stage
    message: str
    log_tail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A whole report.

    Attributes:
        complete: everything that was asked for was measured or is among the failures.
        created: when the benchmark was started, UTC, ISO 8601.
        command: the command line that made it.
        machine, settings, methods, rows, failures: see their types.
        schema_version: see above.
    """

    complete: bool
    created: str
    command: tuple[str, ...]
    machine: Machine
    settings: Settings
    methods: tuple[MethodEntry, ...]
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    schema_version: int = SCHEMA_VERSION


def write_report(report: Report, path: Path) -> None:
    """Write a report in one step: readers see the old file or the new one, never half of one.

    Raises:
        BenchError: the file cannot be written.
    """
    plain = asdict(report)
    write_json({"schema_version": plain.pop("schema_version"), **plain}, path)


def read_report(path: Path) -> Report:
    """Read a report back.

    Raises:
        BenchError: the file cannot be read, or is not a report of this schema version.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"cannot read the report {path}: {error.strerror}") from error
    except ValueError as error:
        raise BenchError(f"{path} is not a report: {error}") from error
    version = plain.get("schema_version") if isinstance(plain, dict) else None
    if version != SCHEMA_VERSION:
        raise BenchError(f"{path}: schema version {version!r}, this program reads {SCHEMA_VERSION}")
    try:
        parts = {
            **plain,
            "machine": _from_plain(Machine, plain["machine"]),
            "settings": _from_plain(Settings, plain["settings"]),
            "methods": tuple(_from_plain(MethodEntry, entry) for entry in plain["methods"]),
            "rows": tuple(_from_plain(Row, entry) for entry in plain["rows"]),
            "failures": tuple(_from_plain(Failure, entry) for entry in plain["failures"]),
        }
        return _from_plain(Report, parts)
    except (KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path} is not a report: {error}") from error


def _from_plain(part: type[_Part], plain: Mapping[str, Any]) -> _Part:
    known = {attribute.name for attribute in fields(part)}  # type: ignore[arg-type]  # only dataclasses are passed
    return part(**{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k in known})
