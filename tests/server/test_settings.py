import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from server.settings import EngineSettings, ModelSettings, Settings, SpeculationSettings
from server.settings_catalogue import Setting, catalogue, nearest


def setting(key: str) -> Setting:
    return catalogue()[key]


def test_every_setting_has_a_description_and_a_default_that_it_allows() -> None:
    for known in catalogue().values():
        assert known.field.description, known.key
        assert known.parse(known.field.default) is not None or known.field.default is None


def test_the_names_that_other_modules_rely_on() -> None:
    names = {section: set(getattr(Settings(), section).model_dump()) for section in Settings.model_fields}
    assert names == {
        "model": {"source", "served_name", "dtype", "weight_format", "max_model_len", "cache_dir"},
        "engine": {
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_gib",
            "block_size",
            "prefix_caching",
            "enforce_eager",
            "seed",
            "instruction_set",
        },
        "speculation": {
            "enabled",
            "drafter",
            "max_draft_tokens",
            "survival_floor",
            "min_draft_tokens",
            "policy",
            "repetition",
            "trace_file",
            "path",
            "beam_width",
            "max_passes",
            "observe_threshold",
            "calibrated_threshold",
            "stop_at_end",
            "coupled_sampling",
        },
        "server": {"host", "port", "log_level", "shutdown_grace_seconds"},
    }


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().server.port = 9000


def test_home_is_expanded_in_defaults_and_in_values() -> None:
    assert "~" not in str(ModelSettings().cache_dir)
    assert "~" not in str(setting("model.cache_dir").parse("~/models"))


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("server.port", "a whole number from 1 to 65535"),
        ("engine.kv_cache_gib", "a number above 0 to 65536 (GiB)"),
        ("speculation.max_draft_tokens", "a whole number from 1 to 32 (tokens)"),
        ("speculation.survival_floor", "a number from 0 to 1 (probability)"),
        ("engine.prefix_caching", "true or false"),
        ("model.dtype", "one of float32, bfloat16, float16, auto"),
        ("model.source", "text that is not empty"),
        ("model.cache_dir", "a path"),
    ],
)
def test_what_a_setting_takes_is_said_with_range_and_unit(key: str, allowed: str) -> None:
    assert setting(key).allowed == allowed


@given(st.integers())
def test_whole_numbers_are_read_from_text_exactly_within_their_range(value: int) -> None:
    if 1 <= value <= 32:
        assert setting("speculation.max_draft_tokens").parse(str(value)) == value
    else:
        with pytest.raises(ValueError, match="from 1 to 32"):
            setting("speculation.max_draft_tokens").parse(str(value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("server.port", True),  # YAML's `port: yes`
        ("server.port", 80.5),
        ("server.port", ""),
        ("server.port", [80]),
        ("speculation.survival_floor", "nan"),
        ("speculation.survival_floor", 1.01),
        ("engine.kv_cache_gib", 0),
        ("engine.kv_cache_gib", "inf"),
        ("engine.prefix_caching", "perhaps"),
        ("model.dtype", "float64"),
        ("model.source", ""),
        ("model.served_name", 7),
        ("server.host", None),
    ],
)
def test_values_of_another_kind_or_out_of_range_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match="^(a|one of|text|true)"):
        setting(key).parse(value)


def test_only_the_optional_name_may_be_null() -> None:
    assert setting("model.served_name").parse(None) is None


@pytest.mark.parametrize("text", ["true", "on", "1", "yes"])
def test_switches_are_read_from_words(text: str) -> None:
    assert setting("speculation.enabled").parse(text) is True


def test_a_step_must_have_room_for_a_token_of_every_request() -> None:
    with pytest.raises(ValidationError, match="max_num_batched_tokens = 64 is less than engine.max_num_seqs = 128"):
        Settings(engine=EngineSettings(max_num_seqs=128, max_num_batched_tokens=64))


def test_sections_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="extra"):
        SpeculationSettings.model_validate({"draft": 3})


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("port", "server.port"),
        ("engine.blok_size", "engine.block_size"),
        ("max-num-seqs", "engine.max_num_seqs"),
        ("SERVER.PORT", "server.port"),
    ],
)
def test_the_nearest_setting_is_found_with_or_without_its_section(word: str, key: str) -> None:
    found = nearest(word)
    assert found is not None
    assert found.key == key


def test_nothing_is_near_to_nonsense() -> None:
    assert nearest("zzzz") is None
