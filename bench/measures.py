"""From measured loads to the rows of a report: pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from bench.client import Answer
from bench.methods import Method
from bench.plan import Cell
from bench.prompts import ALL_CATEGORIES
from bench.report import Row
from bench.speculation import SpeculationCounters

__all__ = ["AR", "VLLM", "CellResult", "build_rows", "paired_ratios", "percentile", "same_text_fraction"]

VLLM = "vllm"
AR = "ar"
"""The two baselines that rows are compared with, where they were measured."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """A measured load.

    Attributes:
        cell: what was measured.
        answers: in the order of the category's prompts.
        wall_seconds: from the first request to the last answer.
        counters: what the load added to the server's counters; ``None`` where it has none.
    """

    cell: Cell
    answers: tuple[Answer, ...]
    wall_seconds: float
    counters: SpeculationCounters | None = None


_Repeats = Mapping[int, Sequence[CellResult]]
"""The loads of one row: one of each category in each repeat."""


def build_rows(
    results: Sequence[CellResult],
    methods: Sequence[Method],
    categories: Sequence[str],
    weight_format: str,
    *,
    greedy: bool,
) -> tuple[Row, ...]:
    """The rows of everything measured so far: methods in their order, concurrencies as they were first measured, the
    categories in their order and ``all`` behind them.

    Args:
        results: measured loads, in any order.
        methods: the methods of the report.
        categories: the categories of the prompt file.
        weight_format: the format that the engines hold their weights in; those that are not ours choose their own.
        greedy: the answers were decoded at temperature 0, so that texts can be compared.
    """
    groups = _group(results, categories)
    concurrencies = tuple(dict.fromkeys(result.cell.concurrency for result in results))
    rows = []
    for method in methods:
        for concurrency in concurrencies:
            for category in (*categories, ALL_CATEGORIES):
                of_row = groups.get((method.name, concurrency, category))
                if of_row:
                    references = {name: groups.get((name, concurrency, category), {}) for name in (AR, VLLM)}
                    cell = Cell(0, concurrency, category, method.name)
                    of_method = None if method.external else weight_format
                    rows.append(_row(cell, of_row, references, of_method, plain=method.plain, greedy=greedy))
    return tuple(rows)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The ``percent``-th percentile with linear interpolation between neighbours; ``None`` of nothing."""
    return float(np.percentile(values, percent)) if values else None


def paired_ratios(speeds: Mapping[int, float], reference: Mapping[int, float]) -> tuple[float, ...]:
    """``speeds / reference`` for each repeat that both have, in the order of the repeats."""
    shared = sorted(speeds.keys() & reference.keys())
    return tuple(speeds[repeat] / reference[repeat] for repeat in shared if reference[repeat] > 0)


def same_text_fraction(results: _Repeats, reference: _Repeats) -> float | None:
    """The share of the answers that have the same text as the reference's answer to the same prompt and repeat.

    A failed request is a different text; a prompt that the reference failed to answer is not compared.

    Returns:
        Between 0 and 1, or ``None`` where there is nothing to compare.
    """
    same = []
    for repeat in results.keys() & reference.keys():
        theirs = {load.cell.category: load.answers for load in reference[repeat]}
        for load in results[repeat]:
            pairs = zip(load.answers, theirs[load.cell.category], strict=True)
            same += [_same(ours, other) for ours, other in pairs if other.error is None]
    return sum(same) / len(same) if same else None


def _group(results: Sequence[CellResult], categories: Sequence[str]) -> dict[tuple[str, int, str], _Repeats]:
    groups: dict[tuple[str, int, str], dict[int, list[CellResult]]] = {}
    for result in results:
        cell = result.cell
        for category in (cell.category, ALL_CATEGORIES):
            repeats = groups.setdefault((cell.method, cell.concurrency, category), {})
            repeats.setdefault(cell.repeat, []).append(result)
    # Repeats that lack a category would make the sum over all of them another mix of prompts.
    return {
        key: {
            repeat: loads
            for repeat, loads in repeats.items()
            if key[2] != ALL_CATEGORIES or len(loads) == len(categories)
        }
        for key, repeats in groups.items()
    }


def _row(
    cell: Cell,
    repeats: _Repeats,
    references: Mapping[str, _Repeats],
    weight_format: str | None,
    *,
    plain: bool,
    greedy: bool,
) -> Row:
    answers = [answer for loads in repeats.values() for load in loads for answer in load.answers]
    answered = [answer for answer in answers if answer.error is None]
    first = [answer.time_to_first_token for answer in answered]
    each = [answer.time_per_output_token for answer in answered if answer.time_per_output_token is not None]
    whole = [answer.end_to_end for answer in answered]
    speeds = _speeds(repeats)
    ordered = tuple(speeds[repeat] for repeat in sorted(speeds))
    ratios = {name: paired_ratios(speeds, _speeds(reference)) for name, reference in references.items()}
    identical = same_text_fraction(repeats, references[AR]) if greedy else None
    counters = _sum_counters(repeats)
    return Row(
        method=cell.method,
        concurrency=cell.concurrency,
        category=cell.category,
        weight_format=weight_format,
        repeats=len(repeats),
        requests=len(answered),
        failed_requests=len(answers) - len(answered),
        prompt_tokens=sum(answer.prompt_tokens for answer in answered),
        output_tokens=sum(answer.output_tokens for answer in answered),
        tokens_per_second=median(ordered),
        tokens_per_second_spread=(min(ordered), max(ordered)),
        tokens_per_second_by_repeat=ordered,
        time_to_first_token_p50_seconds=percentile(first, 50),
        time_to_first_token_p95_seconds=percentile(first, 95),
        time_per_output_token_p50_seconds=percentile(each, 50),
        time_per_output_token_p95_seconds=percentile(each, 95),
        end_to_end_p50_seconds=percentile(whole, 50),
        end_to_end_p95_seconds=percentile(whole, 95),
        emitted_per_verify_step=1.0 if plain else counters.emitted_per_verify_step if counters else None,
        drafted_tokens=counters.drafted_tokens if counters else None,
        verified_tokens=counters.verified_tokens if counters else None,
        accepted_tokens=counters.accepted_tokens if counters else None,
        identical_to_ar=None if identical is None else identical == 1.0,
        identical_fraction=identical,
        repeatable_fraction=_repeatable_fraction(repeats) if greedy else None,
        speed_vs_ar=median(ratios[AR]) if ratios[AR] else None,
        speed_vs_ar_spread=(min(ratios[AR]), max(ratios[AR])) if ratios[AR] else None,
        speed_vs_vllm=median(ratios[VLLM]) if ratios[VLLM] else None,
        speed_vs_vllm_spread=(min(ratios[VLLM]), max(ratios[VLLM])) if ratios[VLLM] else None,
    )


def _speeds(repeats: _Repeats) -> dict[int, float]:
    """Output tokens per second of each repeat."""
    return {
        repeat: sum(answer.output_tokens for load in loads for answer in load.answers)
        / sum(load.wall_seconds for load in loads)
        for repeat, loads in repeats.items()
    }


def _sum_counters(repeats: _Repeats) -> SpeculationCounters | None:
    total = SpeculationCounters()
    for loads in repeats.values():
        for load in loads:
            if load.counters is None:
                return None
            total += load.counters
    return total


def _repeatable_fraction(repeats: _Repeats) -> float | None:
    if len(repeats) < 2:
        return None
    texts: dict[tuple[str, int], list[Answer]] = {}
    for loads in repeats.values():
        for load in loads:
            for index, answer in enumerate(load.answers):
                texts.setdefault((load.cell.category, index), []).append(answer)
    same = [all(_same(answer, answers[0]) for answer in answers) for answers in texts.values()]
    return sum(same) / len(same)


def _same(ours: Answer, other: Answer) -> bool:
    return ours.error is None and other.error is None and ours.text == other.text
