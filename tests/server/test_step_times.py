from pathlib import Path

import pytest

from server.settings import EngineSettings, ModelSettings, Settings, SpeculationSettings
from server.step_times import step_times_file, step_times_identity


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A target's and a drafter's."""
    made = tmp_path / "target", tmp_path / "drafter"
    for folder in made:
        folder.mkdir()
        (folder / "config.json").write_text('{"hidden_size": 64}')
    return made


def test_the_same_run_has_the_same_identity(folders: tuple[Path, Path]) -> None:
    assert step_times_identity(Settings(), *folders, "k1") == step_times_identity(Settings(), *folders, "k1")


@pytest.mark.parametrize(
    "settings",
    [
        Settings(model=ModelSettings(weight_format="bfloat16")),
        Settings(engine=EngineSettings(instruction_set="avx2")),
        Settings(engine=EngineSettings(max_num_batched_tokens=512)),
        Settings(speculation=SpeculationSettings(max_draft_tokens=3)),
        Settings(speculation=SpeculationSettings(max_passes=2)),
    ],
    ids=["weights", "instructions", "batch", "drafts", "passes"],
)
def test_what_changes_step_times_changes_the_identity(folders: tuple[Path, Path], settings: Settings) -> None:
    assert step_times_identity(settings, *folders, "k1") != step_times_identity(Settings(), *folders, "k1")


def test_other_kernels_models_and_machines_are_told_apart(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = step_times_identity(Settings(), *folders, "k1")
    assert step_times_identity(Settings(), *folders, "k2") != before
    monkeypatch.setattr("server.step_times.cpu_model_and_flags", lambda: ("Another CPU", frozenset()))
    assert step_times_identity(Settings(), *folders, "k1") != before
    monkeypatch.undo()
    for folder in folders:
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text('{"hidden_size": 65}')
        assert step_times_identity(Settings(), *folders, "k1") != before
        (folder / "config.json").write_text(text)
    assert step_times_identity(Settings(), *folders, "k1") == before


def test_every_identity_has_a_file_of_its_own(tmp_path: Path) -> None:
    one, other = step_times_file(tmp_path, "a"), step_times_file(tmp_path, "b")
    assert one != other and one == step_times_file(tmp_path, "a")
    assert one.parent == tmp_path / "step-times"
