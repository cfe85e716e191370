from itertools import pairwise
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.methods import METHODS, EngineSettings, cpu_environment, find_methods
from server.flags import add_settings_flags, settings_of
from server.parser import Parser

SETTINGS = EngineSettings(
    Path("/models/target"), kv_cache_gib=0.5, vllm_args=("--no-enforce-eager",), engine_args=("--engine.seed=1",)
)


def test_methods_come_in_the_order_asked_for() -> None:
    assert [method.name for method in find_methods("slipstream, vllm", METHODS)] == ["slipstream", "vllm"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("vllm,nope", 'unknown method "nope"; known methods: vllm, ar, slipstream'),
        ("ar,ar", 'method "ar" is given twice'),
        (" , ", "no methods given; known methods: vllm, ar, slipstream"),
    ],
)
def test_bad_lists_of_methods(names: str, message: str) -> None:
    with pytest.raises(BenchError) as error:
        find_methods(names, METHODS)
    assert str(error.value) == message


def flags(command: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in pairwise(command) if name.startswith("--")}


def test_all_engines_get_the_same_settings() -> None:
    theirs = flags(METHODS["vllm"].launch(SETTINGS, 8123).command)
    ours = flags(METHODS["slipstream"].launch(SETTINGS, 8123).command)
    assert ours["--model.source"] == "/models/target"
    assert theirs["--kv-cache-memory-bytes"] == str(2**29)
    assert ours["--engine.kv_cache_gib"] == "0.5"
    for vllm_name, our_name in (
        ("--dtype", "--model.dtype"),
        ("--max-model-len", "--model.max_model_len"),
        ("--max-num-seqs", "--engine.max_num_seqs"),
        ("--max-num-batched-tokens", "--engine.max_num_batched_tokens"),
        ("--block-size", "--engine.block_size"),
        ("--host", "--server.host"),
        ("--port", "--server.port"),
    ):
        assert theirs[vllm_name] == ours[our_name]


def test_ar_is_our_engine_without_drafts_and_nothing_else() -> None:
    ar = METHODS["ar"].launch(SETTINGS, 1).command
    slipstream = METHODS["slipstream"].launch(SETTINGS, 1).command
    assert set(ar) ^ set(slipstream) == {"--no-speculation.enabled", "--speculation.enabled"}
    assert "--engine.seed=1" in ar
    assert METHODS["vllm"].launch(SETTINGS, 1).command[-1] == "--no-enforce-eager"


def test_our_servers_understand_their_flags() -> None:
    for name, drafts in (("ar", False), ("slipstream", True)):
        command = METHODS[name].launch(SETTINGS, 8123).command
        assert command[1:4] == ("-m", "server.cli", "serve")
        parser = Parser()
        add_settings_flags(parser)
        settings = settings_of(parser.parse_args(command[4:]), environ={})
        assert settings.speculation.enabled is drafts
        assert settings.model.source == "/models/target"
        assert (settings.engine.kv_cache_gib, settings.server.port) == (0.5, 8123)


def test_cpu_environment_preloads_what_is_there(tmp_path: Path) -> None:
    for name in ("libiomp5.so", "libiomp5_db.so", "libtcmalloc_minimal_debug.so.4", "libtcmalloc_minimal.so.4"):
        (tmp_path / name).touch()
    environment = cpu_environment({"LD_PRELOAD": "/lib/other.so"}, [tmp_path])
    assert environment == {
        "LD_PRELOAD": f"/lib/other.so:{tmp_path}/libtcmalloc_minimal.so.4:{tmp_path}/libiomp5.so",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


def test_cpu_environment_never_preloads_two_of_a_kind(tmp_path: Path) -> None:
    for name in ("libiomp5.so", "libtcmalloc.so.4"):
        (tmp_path / name).touch()
    given = "/opt/libtcmalloc_minimal.so.4:/opt/libgomp.so.1"
    assert cpu_environment({"LD_PRELOAD": given}, [tmp_path])["LD_PRELOAD"] == given
    assert "LD_PRELOAD" not in cpu_environment({}, [tmp_path / "empty"])
