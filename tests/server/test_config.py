from collections.abc import Mapping
from pathlib import Path

import pytest

from server.config import DEFAULT_PRESET, load_settings, preset_names
from server.errors import ConfigError
from server.settings import Settings


def write(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(config: str, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(config, environ or {}, flags or {})
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", preset_names())
def test_shipped_presets_load(name: str) -> None:
    assert isinstance(load_settings(name, {}, {}), Settings)


def test_the_default_preset_is_the_small_model_on_a_cpu() -> None:
    settings = load_settings(DEFAULT_PRESET, {}, {})
    assert (settings.model.source, settings.model.dtype) == ("smollm2-135m-instruct", "float32")
    assert settings.speculation.enabled


def test_the_preset_for_a_gpu_says_that_it_was_never_run() -> None:
    text = (Path(__file__).parents[2] / "configs" / "qwen3-8b-h100.yaml").read_text(encoding="utf-8")
    assert "NEVER RUN" in text
    assert load_settings("qwen3-8b-h100", {}, {}).model.dtype == "bfloat16"


def test_flags_go_over_the_environment_and_that_over_the_preset(tmp_path: Path) -> None:
    config = write(tmp_path, "server: {port: 1001, host: a}\nengine: {seed: 1}\n")
    environ = {"SLIPSTREAM_SERVER__PORT": "1002", "SLIPSTREAM_ENGINE__SEED": "2", "HOME": "/root"}
    settings = load_settings(config, environ, {"server.port": "1003"})
    assert (settings.server.port, settings.engine.seed, settings.server.host) == (1003, 2, "a")


def test_what_no_layer_sets_keeps_its_default(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, ""), {}, {}) == Settings()


def test_a_section_with_everything_commented_out_is_fine(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "engine:\n#  seed: 1\n"), {}, {}) == Settings()


def test_an_unknown_key_of_a_preset_names_file_key_value_and_nearest(tmp_path: Path) -> None:
    config = write(tmp_path, "engine:\n  max_num_seq: 3\n")
    message = refusal(config)
    assert message == (
        f"{config}: unknown setting 'engine.max_num_seq' (value 3); nearest known setting: engine.max_num_seqs, "
        "which takes a whole number from 1 to 4096 (requests)"
    )


def test_an_unknown_variable_is_an_error_and_not_ignored() -> None:
    message = refusal(DEFAULT_PRESET, {"SLIPSTREAM_SERVER__PROT": "80"})
    assert message.startswith(
        "environment variable SLIPSTREAM_SERVER__PROT: unknown setting 'server.prot' (value '80')"
    )
    assert "nearest known setting: server.port" in message
    assert "server.port" in refusal(DEFAULT_PRESET, {"SLIPSTREAM_PORT": "80"})


def test_an_unknown_key_that_resembles_nothing_lists_what_there_is() -> None:
    assert "known settings there: server.host, server.port" in refusal(DEFAULT_PRESET, {}, {"server.qqqqqqqq": "1"})
    assert "with the sections model, engine, speculation, server" in refusal(DEFAULT_PRESET, {"SLIPSTREAM_QQQ": "1"})


def test_a_value_out_of_range_names_source_key_value_and_range(tmp_path: Path) -> None:
    config = write(tmp_path, "speculation:\n  max_draft_tokens: 99\n")
    assert refusal(config) == (
        f"{config}: speculation.max_draft_tokens = 99 is not allowed; it takes a whole number from 1 to 32 (tokens)"
    )
    assert refusal(DEFAULT_PRESET, {"SLIPSTREAM_SERVER__PORT": "http"}) == (
        "environment variable SLIPSTREAM_SERVER__PORT: server.port = 'http' is not allowed; "
        "it takes a whole number from 1 to 65535"
    )
    assert refusal(DEFAULT_PRESET, {}, {"model.dtype": "int4"}) == (
        "flag --model.dtype: model.dtype = 'int4' is not allowed; it takes one of float32, bfloat16, float16, auto"
    )


def test_a_mistake_in_a_lower_layer_is_not_hidden_by_a_higher_one(tmp_path: Path) -> None:
    assert "port = 0" in refusal(write(tmp_path, "server: {port: 0}"), {}, {"server.port": "8000"})


def test_values_that_do_not_go_together_are_named_both() -> None:
    message = refusal(DEFAULT_PRESET, {}, {"engine.max_num_seqs": "512", "engine.max_num_batched_tokens": "100"})
    assert message.startswith("engine.max_num_batched_tokens = 100 is less than engine.max_num_seqs = 512")


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load_settings(DEFAULT_PRESET, {"SLIPSTREAM_SERVER__PORT": ""}, {}).server.port == 8000


def test_variables_that_kubernetes_makes_for_a_service_are_not_settings() -> None:
    links = {
        "SLIPSTREAM_SERVICE_HOST": "10.0.0.7",
        "SLIPSTREAM_SERVICE_PORT": "8000",
        "SLIPSTREAM_SERVICE_PORT_HTTP": "8000",
        "SLIPSTREAM_PORT": "tcp://10.0.0.7:8000",
        "SLIPSTREAM_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "SLIPSTREAM_PORT_8000_TCP_ADDR": "10.0.0.7",
    }
    assert load_settings(DEFAULT_PRESET, links, {}) == load_settings(DEFAULT_PRESET, {}, {})


def test_a_preset_that_does_not_exist_names_those_that_do() -> None:
    message = refusal("smollm2-gpu")
    assert "presets: qwen3-8b-h100, smollm2-cpu; nearest: smollm2-cpu" in message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("server: [port\n", "line 2: not valid YAML"),
        ("- server\n", "expected sections (model, engine, speculation, server)"),
        ("server: 8000\n", "server = 8000 is not allowed; it takes settings"),
        ("port: 8000\n", "unknown setting 'port' (value 8000); nearest known setting: server.port"),
        ("servers: {port: 8000}\n", "unknown setting 'servers.port' (value 8000); nearest known setting: server.port"),
        ("engine: {7: 8}\n", "unknown setting 'engine.7' (value 8)"),
        ("server: {port: yes}\n", "server.port = True is not allowed"),
    ],
)
def test_malformed_presets_are_answered_with_file_and_place(tmp_path: Path, text: str, complaint: str) -> None:
    config = write(tmp_path, text)
    message = refusal(config)
    assert message.startswith(config)
    assert complaint in message


def test_a_preset_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(str(tmp_path / "my.yaml"))
