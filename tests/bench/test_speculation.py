from collections.abc import Mapping

import httpx
import pytest

from bench.speculation import SpeculationCounters, read_counters

METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 30.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="a } b"} 160.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 60.0
process_start_time_seconds 1.7e+09
odd_histogram_bucket{le="+Inf"} NaN
"""


def client(routes: Mapping[str, httpx.Response]) -> httpx.Client:
    transport = httpx.MockTransport(lambda request: routes.get(request.url.path, httpx.Response(404)))
    return httpx.Client(transport=transport, base_url="http://server")


def counted(steps: int) -> dict[str, int]:
    return {
        "verify_steps": steps,
        "emitted_tokens": 2 * steps,
        "drafted_tokens": 5 * steps,
        "verified_tokens": 3 * steps,
        "accepted_tokens": steps,
    }


def test_our_route_comes_first() -> None:
    routes = {
        "/v1/speculation": httpx.Response(200, json={"since_start": {**counted(4), "new": 1}, "last_minute": {}}),
        "/metrics": httpx.Response(200, text=METRICS),
    }
    with client(routes) as http:
        assert read_counters(http) == SpeculationCounters(4, 8, 20, 12, 4)


def test_vllms_metrics_are_summed_over_engines() -> None:
    with client({"/metrics": httpx.Response(200, text=METRICS)}) as http:
        assert read_counters(http) == SpeculationCounters(40, 100, 160, 160, 60)


@pytest.mark.parametrize(
    "routes",
    [
        {},
        {"/metrics": httpx.Response(200, text="vllm:generation_tokens_total 5\n")},
        {"/v1/speculation": httpx.Response(200, json={"since_start": {"verify_steps": 1}})},
        {"/v1/speculation": httpx.Response(200, text="not JSON")},
    ],
)
def test_servers_without_counters(routes: dict[str, httpx.Response]) -> None:
    with client(routes) as http:
        assert read_counters(http) is None


def test_differences_and_sums() -> None:
    before, after = SpeculationCounters(**counted(4)), SpeculationCounters(**counted(10))
    assert after.since(before) == SpeculationCounters(**counted(6))
    assert after.since(before) + before == after
    assert after.emitted_per_verify_step == 2.0
    assert SpeculationCounters().emitted_per_verify_step is None
