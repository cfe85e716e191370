from bench.client import Answer
from bench.measures import CellResult, build_rows, paired_ratios, percentile
from bench.methods import EngineSettings, Launch, Method
from bench.plan import Cell
from bench.report import Row
from bench.speculation import SpeculationCounters


def no_launch(_settings: EngineSettings, _port: int) -> Launch:
    raise AssertionError


METHODS = (
    Method("vllm", "", no_launch, plain=True),
    Method("ar", "", no_launch, plain=True),
    Method("slipstream", "", no_launch),
)
CATEGORIES = ("math", "chat")


def said(text: str, tokens: int = 10, first: float = 0.1, each: float | None = 0.01) -> Answer:
    return Answer(text, 3, tokens, first, each, first + 0.5)


def result(
    method: str,
    answers: tuple[Answer, ...],
    seconds: float = 1.0,
    *,
    category: str = "math",
    repeat: int = 0,
    concurrency: int = 1,
    counters: SpeculationCounters | None = None,
) -> CellResult:
    return CellResult(Cell(repeat, concurrency, category, method), answers, seconds, counters)


def rows_of(*results: CellResult, greedy: bool = True) -> dict[tuple[str, int, str], Row]:
    rows = build_rows(results, METHODS, CATEGORIES, "float32", greedy=greedy)
    return {(row.method, row.concurrency, row.category): row for row in rows}


def test_percentiles_interpolate() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([0.0, 10.0], 95) == 9.5
    assert percentile([7.0], 95) == 7.0
    assert percentile([], 50) is None


def test_ratios_pair_the_repeats_that_both_have() -> None:
    assert paired_ratios({0: 30.0, 1: 10.0, 2: 5.0}, {0: 10.0, 2: 10.0, 3: 1.0}) == (3.0, 0.5)
    assert paired_ratios({0: 1.0}, {1: 1.0}) == ()


def test_speed_is_the_median_over_repeats_with_its_spread() -> None:
    rows = rows_of(
        *(
            result("ar", (said("a", 10), said("b", 20)), seconds, repeat=repeat)
            for repeat, seconds in enumerate((1.0, 3.0, 2.0))
        )
    )
    row = rows["ar", 1, "math"]
    assert row.tokens_per_second_by_repeat == (30.0, 10.0, 15.0)
    assert row.tokens_per_second == 15.0
    assert row.tokens_per_second_spread == (10.0, 30.0)
    assert (row.repeats, row.requests, row.failed_requests, row.output_tokens, row.prompt_tokens) == (3, 6, 0, 90, 18)
    assert row.weight_format == "float32"


def test_the_weights_of_a_server_that_is_not_ours_are_unknown() -> None:
    other = Method("other", "", no_launch, external="http://127.0.0.1:8081")
    results = [result(name, (said("a"),), seconds) for name, seconds in (("ar", 1.0), ("other", 0.5))]
    ours, theirs = build_rows(results, (METHODS[1], other), ("math",), "float32", greedy=True)[::2]
    assert (ours.weight_format, theirs.weight_format) == ("float32", None)
    assert (theirs.method, theirs.speed_vs_ar, theirs.identical_to_ar) == ("other", 2.0, True)
    assert theirs.emitted_per_verify_step is None


def test_paired_ratios_ignore_what_slows_down_both() -> None:
    rows = rows_of(
        result("vllm", (said("a"),), 1.0, repeat=0),
        result("vllm", (said("a"),), 10.0, repeat=1),
        result("vllm", (said("a"),), 1.0, repeat=2),
        result("slipstream", (said("a"),), 0.5, repeat=0),
        result("slipstream", (said("a"),), 4.0, repeat=1),
        result("slipstream", (said("a"),), 0.25, repeat=2),
    )
    row = rows["slipstream", 1, "math"]
    assert (row.speed_vs_vllm, row.speed_vs_vllm_spread) == (2.5, (2.0, 4.0))
    assert (row.speed_vs_ar, row.speed_vs_ar_spread) == (None, None)
    assert rows["vllm", 1, "math"].speed_vs_vllm == 1.0


def test_latencies_cover_answered_requests_only() -> None:
    failed = Answer(error="HTTP 500")
    row = rows_of(result("ar", (said("a", first=0.1), said("b", 1, first=0.3, each=None), failed)))["ar", 1, "math"]
    assert (row.requests, row.failed_requests, row.output_tokens) == (2, 1, 11)
    assert row.time_to_first_token_p50_seconds == 0.2
    assert row.time_per_output_token_p50_seconds == row.time_per_output_token_p95_seconds == 0.01
    assert row.end_to_end_p50_seconds == 0.7
    alone = rows_of(result("ar", (said("b", 1, each=None),)))["ar", 1, "math"]
    assert alone.time_per_output_token_p50_seconds is None


def test_all_sums_up_categories_by_time_not_by_row() -> None:
    rows = rows_of(
        result("ar", (said("a", 10),), 1.0, category="math"),
        result("ar", (said("b", 90),), 4.0, category="chat"),
    )
    assert list(rows) == [("ar", 1, "math"), ("ar", 1, "chat"), ("ar", 1, "all")]
    assert rows["ar", 1, "all"].tokens_per_second == 20.0


def test_all_leaves_out_repeats_that_lack_a_category() -> None:
    whole = [result("ar", (said("a"),), category=category) for category in CATEGORIES]
    rows = rows_of(*whole, result("ar", (said("a"),), 0.1, category="math", repeat=1))
    assert rows["ar", 1, "math"].repeats == 2
    assert rows["ar", 1, "all"].tokens_per_second_by_repeat == (10.0,)
    assert ("ar", 1, "all") not in rows_of(whole[0])


def test_identical_means_every_text_at_the_same_concurrency_and_repeat() -> None:
    rows = rows_of(
        result("ar", (said("a"), said("b")), concurrency=1),
        result("ar", (said("a"), said("B")), concurrency=4),
        result("slipstream", (said("a"), said("b")), concurrency=1),
        result("slipstream", (said("a"), said("b")), concurrency=4),
    )
    assert rows["slipstream", 1, "math"].identical_to_ar is True
    assert rows["slipstream", 1, "math"].identical_fraction == 1.0
    assert rows["slipstream", 4, "math"].identical_to_ar is False
    assert rows["slipstream", 4, "math"].identical_fraction == 0.5
    assert rows["ar", 4, "math"].identical_to_ar is True


def test_failed_requests_are_not_identical_and_failed_references_are_not_compared() -> None:
    failed = Answer(error="HTTP 500")
    rows = rows_of(
        result("ar", (said("a"), said("b"), failed)),
        result("slipstream", (said("a"), failed, said("c"))),
    )
    assert rows["slipstream", 1, "math"].identical_fraction == 0.5
    nothing = rows_of(result("ar", (failed,)), result("slipstream", (said("a"),)))["slipstream", 1, "math"]
    assert (nothing.identical_to_ar, nothing.identical_fraction) == (None, None)


def test_without_ar_or_greedy_decoding_nothing_is_said_about_texts() -> None:
    alone = rows_of(result("slipstream", (said("a"),)))["slipstream", 1, "math"]
    assert (alone.identical_to_ar, alone.identical_fraction) == (None, None)
    both = (result("ar", (said("a"),), repeat=repeat) for repeat in range(2))
    sampled = rows_of(*both, greedy=False)["ar", 1, "math"]
    assert (sampled.identical_to_ar, sampled.repeatable_fraction) == (None, None)


def test_repeatable_compares_a_method_with_itself() -> None:
    first = result("ar", (said("a"), said("b")), repeat=0)
    assert rows_of(first)["ar", 1, "math"].repeatable_fraction is None
    rows = rows_of(first, result("ar", (said("a"), said("c")), repeat=1))
    assert rows["ar", 1, "math"].repeatable_fraction == 0.5


def test_emitted_per_verify_step_weighs_steps_not_loads() -> None:
    counted = [SpeculationCounters(1, 4, 5, 3, 3), SpeculationCounters(9, 11, 45, 27, 2)]
    rows = rows_of(
        *(
            result("slipstream", (said("a"),), category=category, counters=counters)
            for category, counters in zip(CATEGORIES, counted, strict=True)
        ),
        result("ar", (said("a"),)),
    )
    row = rows["slipstream", 1, "all"]
    assert row.emitted_per_verify_step == 1.5
    assert (row.drafted_tokens, row.verified_tokens, row.accepted_tokens) == (50, 30, 5)
    assert rows["slipstream", 1, "math"].emitted_per_verify_step == 4.0
    assert rows["ar", 1, "math"].emitted_per_verify_step == 1.0
    assert rows["ar", 1, "math"].drafted_tokens is None


def test_unknown_counters_stay_unknown() -> None:
    counters = SpeculationCounters(1, 4, 5, 3, 3)
    rows = rows_of(
        result("slipstream", (said("a"),), category="math", counters=counters),
        result("slipstream", (said("a"),), category="chat"),
    )
    assert rows["slipstream", 1, "all"].emitted_per_verify_step is None
    assert rows["slipstream", 1, "all"].drafted_tokens is None
