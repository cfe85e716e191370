"""The HTTP API over the real engine: what clients send, and what must not take the engine down."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.engine_server import MODEL, EngineServer

_MESSAGES = [{"role": "user", "content": "Name three rivers and say where they flow."}]


@pytest.fixture
def client(drafting_server: EngineServer) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{drafting_server.port}/v1", api_key="none", max_retries=0) as it:
        yield it


@pytest.fixture(autouse=True)
def engine_survives(drafting_server: EngineServer) -> Iterator[None]:
    """Whatever a test sends, the engine answers the next request."""
    yield
    assert drafting_server.complete("One, two, three,", max_tokens=4).text
    assert drafting_server.process.poll() is None


def test_official_client_streamed_equals_unstreamed(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "messages": _MESSAGES, "max_tokens": 48, "temperature": 0}
    whole = client.chat.completions.create(**arguments)
    parts = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))

    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    reasons = [part.choices[0].finish_reason for part in parts if part.choices and part.choices[0].finish_reason]
    assert text == whole.choices[0].message.content != ""
    assert reasons == [whole.choices[0].finish_reason]
    assert parts[-1].usage == whole.usage


def test_models_names_the_target(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_seed_with_several_answers_in_chunks(drafting_server: EngineServer) -> None:
    body = {
        "messages": [{"role": "user", "content": "Describe the sea. " * 25}],
        "seed": 7,
        "n": 2,
        "temperature": 0.9,
        "max_tokens": 24,
    }
    first, second = (drafting_server.post("/v1/chat/completions", body).json() for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(texts) == 2 and texts[0] != texts[1]
    assert texts == [choice["message"]["content"] for choice in second["choices"]]


def test_logprobs_cover_every_token_and_agree_with_the_text(drafting_server: EngineServer) -> None:
    body = {"messages": _MESSAGES, "max_tokens": 24, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    choice = drafting_server.post("/v1/chat/completions", body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    for entry in content:
        assert entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"]) <= 0


def test_stop_string_ends_the_text_before_it(drafting_server: EngineServer) -> None:
    prompt = "Count: one, two, three, four,"
    free = drafting_server.complete(prompt, max_tokens=24).text
    stop = free[len(free) // 2 :][:4]
    stopped = drafting_server.complete(prompt, max_tokens=24, stop=[stop]).text
    assert stopped == free[: free.index(stop)]


def test_json_schema_is_obeyed(drafting_server: EngineServer) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    body = {
        "messages": [{"role": "user", "content": "Give a city and how many people live there, as JSON."}],
        "max_tokens": 120,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    }
    choice = drafting_server.post("/v1/chat/completions", body).json()["choices"][0]
    if choice["finish_reason"] == "stop":
        answer = json.loads(choice["message"]["content"])
        assert set(answer) == {"city", "people"} and isinstance(answer["people"], int)
    else:
        assert choice["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize(
    "extra", [{}, {"frequency_penalty": 0.8, "presence_penalty": 0.5}, {"top_k": 20, "top_p": 0.9}]
)
def test_sampling_parameters_are_served_while_drafting(extra: dict[str, float], drafting_server: EngineServer) -> None:
    options = {"temperature": 0.9, "seed": 3, "max_tokens": 24, **extra}
    first, again = (drafting_server.complete("The old harbour", **options) for _ in range(2))
    assert first.token_ids == again.token_ids and len(first.token_ids) == 24


def test_prompt_that_fills_the_context_is_refused_and_one_token_less_is_answered(
    drafting_server: EngineServer,
) -> None:
    full = [100] * 512
    refused = drafting_server.post("/v1/completions", {"prompt": full, "max_tokens": 1})
    assert refused.status_code == 400
    assert "max_tokens" in refused.json()["error"]["message"]
    too_long = drafting_server.post("/v1/completions", {"prompt": [*full, 100], "max_tokens": 1})
    assert too_long.status_code == 400
    assert "512" in too_long.json()["error"]["message"]
    answered = drafting_server.post("/v1/completions", {"prompt": full[1:], "temperature": 0})
    assert answered.status_code == 200
    assert answered.json()["usage"]["completion_tokens"] == 1


def test_answer_up_to_the_context_limit_beside_short_neighbours(drafting_server: EngineServer) -> None:
    long = {"prompt": [200] * 470, "max_tokens": 42, "temperature": 0, "ignore_eos": True}
    answer = drafting_server.post("/v1/completions", long).json()
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("parameter", [{"min_p": 0.1}, {"logit_bias": {"5": 10}}])
def test_parameters_that_vllm_refuses_while_drafting_get_a_clean_400(
    parameter: dict[str, Any], drafting_server: EngineServer
) -> None:
    response = drafting_server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 4, **parameter})
    assert response.status_code == 400
    assert next(iter(parameter)) in response.json()["error"]["message"]


def test_speculation_report_agrees_with_vllm_metrics(drafting_server: EngineServer) -> None:
    drafting_server.complete("Once upon a time", max_tokens=24)
    report = drafting_server.speculation()
    total = report["since_start"]
    assert report["enabled"] and report["drafter"] == MODEL
    assert total["verify_steps"] == drafting_server.metric("vllm:spec_decode_num_drafts_total")
    assert total["verified_tokens"] == drafting_server.metric("vllm:spec_decode_num_draft_tokens_total")
    assert total["accepted_tokens"] == drafting_server.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert total["emitted_tokens"] == total["verify_steps"] + total["accepted_tokens"]
    assert total["drafted_tokens"] >= total["verified_tokens"] >= total["accepted_tokens"] > 0
    by_position = [position["accepted"] for position in total["positions"]]
    assert by_position == sorted(by_position, reverse=True) and sum(by_position) == total["accepted_tokens"]
    assert 0 < report["last_minute"]["verify_steps"] <= total["verify_steps"]


def test_plain_server_reports_that_drafting_is_off(plain_server: EngineServer) -> None:
    plain_server.complete("Hello", max_tokens=4)
    report = plain_server.speculation()
    assert report["enabled"] is False and report["drafter"] is None and report["max_draft_tokens"] == 0
    assert report["since_start"]["verify_steps"] == 0
