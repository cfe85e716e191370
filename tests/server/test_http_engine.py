"""The HTTP API over the real engine: what clients send, and what must not take the engine down."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from scheduler.draft_limit import DRAFT_LIMIT_KEY
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


_STORY = "The rain in Spain stays mainly in the plain. The rain in Spain stays mainly in the"


def _since(server: EngineServer, before: dict[str, Any]) -> dict[str, Any]:
    """Counts that ``GET /v1/speculation`` tells, less those of an earlier report; lists and numbers alone."""
    now, then = server.speculation()["since_start"], before["since_start"]
    early = [0] * (len(now["draft_lengths"]) - len(then["draft_lengths"]))  # before the first step there is one length
    lengths = zip(now["draft_lengths"], [*then["draft_lengths"], *early], strict=True)
    counts = {name: now[name] - then[name] for name in ("verify_steps", "verified_tokens", "emitted_tokens")}
    return {**counts, "draft_lengths": [a - b for a, b in lengths]}


@pytest.mark.parametrize("limit", [0, 1])
def test_a_request_limits_its_drafts(limit: int, drafting_server: EngineServer) -> None:
    unlimited = drafting_server.complete(_STORY, max_tokens=24)
    before = drafting_server.speculation()
    limited = drafting_server.complete(_STORY, max_tokens=24, speculation={"max_draft_tokens": limit})
    counts = _since(drafting_server, before)
    assert limited == unlimited
    assert counts["emitted_tokens"] == 23  # the first token comes from the prompt's step
    assert not any(counts["draft_lengths"][limit + 1 :])
    assert counts["draft_lengths"][limit] > 0 and counts["verified_tokens"] == limit * counts["draft_lengths"][limit]


def test_only_the_request_that_asks_for_it_is_limited(drafting_server: EngineServer) -> None:
    before = drafting_server.speculation()
    with ThreadPoolExecutor(2) as pool:
        plain = pool.submit(drafting_server.complete, _STORY, max_tokens=24, speculation={"max_draft_tokens": 0})
        other = pool.submit(drafting_server.complete, _STORY, max_tokens=24, speculation={"max_draft_tokens": 99})
    assert plain.result() == other.result()
    counts = _since(drafting_server, before)
    assert counts["draft_lengths"][0] >= 23 and counts["verified_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": _MESSAGES, "max_tokens": 8}),
        ("/v1/responses", {"input": "Name a river.", "max_output_tokens": 8}),
        ("/v1/messages", {"messages": _MESSAGES, "max_tokens": 8}),
    ],
)
def test_every_generating_route_knows_the_limit(path: str, body: dict[str, Any], drafting_server: EngineServer) -> None:
    before = drafting_server.speculation()
    response = drafting_server.post(path, {**body, "speculation": {"max_draft_tokens": 0}})
    assert response.status_code == 200, response.text
    counts = _since(drafting_server, before)
    assert counts["verify_steps"] == counts["draft_lengths"][0] == 7
    response = drafting_server.post(path, {**body, "speculation": {"max_draft_tokens": 0.5}})
    assert response.status_code == 400 and response.json()["error"]["param"] == "speculation.max_draft_tokens"


def test_the_official_client_understands_a_wrong_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"speculation.max_draft_tokens is -1; a whole number") as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=_MESSAGES,  # type: ignore[arg-type]
            extra_body={"speculation": {"max_draft_tokens": -1}},
        )
    assert (caught.value.param, caught.value.type) == ("speculation.max_draft_tokens", "invalid_request_error")


@pytest.mark.parametrize("rubbish", ["no", -1, 2**63 - 1, 2.5, ["a"], [3], True, ""])
def test_limits_past_the_checks_do_no_harm(rubbish: object, drafting_server: EngineServer) -> None:
    body = {"prompt": _STORY, "temperature": 0, "max_tokens": 8, "vllm_xargs": {DRAFT_LIMIT_KEY: rubbish}}
    response = drafting_server.post("/v1/completions", body)
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == drafting_server.complete(_STORY, max_tokens=8).text


def test_speculation_report_agrees_with_the_metrics(drafting_server: EngineServer) -> None:
    drafting_server.complete(_STORY, max_tokens=24)
    report = drafting_server.speculation()
    total = report["since_start"]
    assert report["enabled"] and report["drafter"] == MODEL and report["drafter_healthy"]
    for ours, vllms in (("verify_steps", "drafts"), ("verified_tokens", "draft_tokens"), ("accepted_tokens",) * 2):
        assert total[ours] == drafting_server.metric(f"vllm:spec_decode_num_{vllms}_total")
    for name in ("verify_steps", "drafted_tokens", "verified_tokens", "accepted_tokens", "emitted_tokens", "steps"):
        assert total[name] == drafting_server.metric(f"slipstream:{name}_total"), name
    assert drafting_server.metric("slipstream:draft_length_tokens_count") == total["verify_steps"]
    assert drafting_server.metric("slipstream:draft_length_tokens_sum") == total["verified_tokens"]
    assert total["emitted_tokens"] == total["verify_steps"] + total["accepted_tokens"]
    assert total["drafted_tokens"] >= total["verified_tokens"] >= total["accepted_tokens"] > 0
    by_position = [position["accepted"] for position in total["positions"]]
    assert by_position == sorted(by_position, reverse=True) and sum(by_position) == total["accepted_tokens"]
    assert 0 < report["last_minute"]["verify_steps"] <= total["verify_steps"]


def test_expectations_stand_beside_what_came(drafting_server: EngineServer) -> None:
    for _ in range(4):
        drafting_server.complete(_STORY, max_tokens=24)
    total = drafting_server.speculation()["since_start"]
    assert 0 < total["realised_accepted_tokens"] <= total["accepted_tokens"]
    assert 0 < total["expected_accepted_tokens"] <= total["verified_tokens"]
    assert 0 < total["predicted_step_seconds"] < 10 * total["measured_step_seconds"]
    assert 0 < total["measured_step_seconds"] / total["steps"] < 5


def test_plain_server_reports_that_drafting_is_off(plain_server: EngineServer) -> None:
    answer = plain_server.complete("Hello", max_tokens=4)
    assert plain_server.complete("Hello", max_tokens=4, speculation={"max_draft_tokens": 3}) == answer
    report = plain_server.speculation()
    assert report["enabled"] is False and report["drafter"] is None and report["max_draft_tokens"] == 0
    assert report["since_start"]["verify_steps"] == 0 and report["drafting"] is False
    assert "slipstream:max_draft_tokens 0.0" in plain_server.client.get("/metrics").text


def test_the_engine_computes_on_all_cores(drafting_server: EngineServer) -> None:
    children = Path(f"/proc/{drafting_server.process.pid}/task/{drafting_server.process.pid}/children")
    engines = [int(child) for child in children.read_text().split()]
    assert engines
    for engine in engines:
        assert os.sched_getaffinity(engine) == os.sched_getaffinity(0)
