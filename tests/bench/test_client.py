import json
from typing import Any

import pytest

from bench.client import Answer, Load, _StreamError, _Timeline


def chunk(content: str | None = None, finish: str | None = None, **more: Any) -> str:
    delta = {} if content is None else {"content": content}
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})


def usage(tokens: int) -> str:
    return json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}})


def answer(*events: tuple[float, str]) -> Answer:
    timeline = _Timeline(sent=10.0)
    for now, event in events:
        timeline.take(event, now)
    return timeline.answer()


def test_times_run_from_the_first_to_the_last_token() -> None:
    measured = answer(
        (10.5, chunk("")),  # the role, no token yet
        (11.0, chunk("a")),
        (12.0, chunk("bc")),
        (13.0, chunk(None, "stop")),  # the end-of-sequence token has no text
        (14.0, usage(5)),
        (15.0, "[DONE]"),
    )
    assert measured == Answer("abc", 3, 5, 1.0, 0.5, 3.0)


def test_one_token_has_no_time_between_tokens() -> None:
    assert answer((11.0, chunk("a", "length")), (11.0, usage(1))) == Answer("a", 3, 1, 1.0, None, 1.0)


def test_reasoning_counts_as_text() -> None:
    event = json.dumps({"choices": [{"delta": {"reasoning_content": "hm", "content": None}, "finish_reason": None}]})
    assert answer((11.0, event), (12.0, chunk("!")), (12.0, usage(2))).text == "hm!"


def test_the_stream_of_llama_cpp() -> None:
    role = json.dumps({"choices": [{"finish_reason": None, "delta": {"role": "assistant", "content": None}}]})
    counts = {"completion_tokens": 2, "prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}}
    end = json.dumps({"choices": [], "usage": counts, "timings": {"cache_n": 0, "predicted_n": 2}})
    measured = answer((10.5, role), (11.0, chunk("a")), (12.0, chunk("b")), (12.5, chunk(None, "length")), (13.0, end))
    assert measured == Answer("ab", 3, 2, 1.0, 1.5, 2.5)


def test_streams_without_usage_or_text_are_failures() -> None:
    assert answer((11.0, chunk("a"))).error == "the server reports no token usage for streams"
    assert answer((11.0, "[DONE]")).error == "the stream ended without an answer"


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ('{"error": {"message": "engine died", "code": 500}}', "error in the stream: engine died"),
        ("<html>", "not a chat completion chunk: <html>"),
        ("[1]", "not a chat completion chunk: [1]"),
        ('{"object": "other"}', 'not a chat completion chunk: {"object": "other"}'),
    ],
)
def test_broken_streams(event: str, message: str) -> None:
    with pytest.raises(_StreamError) as error:
        _Timeline(0.0).take(event, 1.0)
    assert str(error.value) == message


def test_limits_of_answers_are_spread_evenly() -> None:
    load = Load(("p",) * 40, 4, 64, shortest=25)
    assert sorted(load.limit(index) for index in range(40)) == pytest.approx(range(25, 65), abs=2)
    assert [Load(("p",) * 3, 1, 9).limit(index) for index in range(3)] == [9, 9, 9]
