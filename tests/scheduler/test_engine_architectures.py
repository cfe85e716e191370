"""Targets whose layers run in one call answer, in a real engine, what vLLM's own layers answer."""

from typing import Any

import pytest

from cuda_ext import ops
from tests.process_report import report_of

_TOLERANCE = 1e-4  # nats: of two implementations in float32
EVERY_ARCHITECTURE = pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What ``tests.scheduler.architectures`` prints."""
    if not ops.kernels().cpu_compiled:
        pytest.skip("compiled kernels are not built")
    return report_of("tests.scheduler.architectures", tmp_path_factory.mktemp("architectures"))


@EVERY_ARCHITECTURE
def test_all_layers_are_fused_or_none(reports: Any, name: str) -> None:
    assert reports[name]["exact"]["forwards"] == ["FusedDecoderLayer"] * 2
    assert reports[name]["vllm"]["forwards"] == ["method"] * 2


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("run", ["together", "again", "alone"])
def test_fused_layers_answer_as_vllms_do(reports: Any, name: str, run: str) -> None:
    fused, plain = reports[name]["exact"][run], reports[name]["vllm"][run]
    assert fused.keys() == plain.keys() == {"short", "long", "longest"}
    for request, expected in plain.items():
        answer = fused[request]
        assert expected["closest"] > 10 * _TOLERANCE, "two tokens are so close that anything could decide"
        assert answer["tokens"] == expected["tokens"]
        assert answer["logprobs"] == pytest.approx(expected["logprobs"], abs=_TOLERANCE)
        assert answer["prompt_logprobs"] == pytest.approx(expected["prompt_logprobs"], abs=_TOLERANCE)
    assert run != "together" or [len(fused[r]["prompt_logprobs"]) for r in ("short", "long")] == [4, 169]


@EVERY_ARCHITECTURE
def test_a_fused_answer_depends_neither_on_the_batch_nor_on_cached_pages(reports: Any, name: str) -> None:
    """To the last bit of every log-probability: read in parts beside others, found in cached pages, and alone."""
    together, again, alone = (reports[name]["exact"][run] for run in ("together", "again", "alone"))
    for request in together:
        for part in ("tokens", "logprobs"):
            assert together[request][part] == again[request][part] == alone[request][part]
