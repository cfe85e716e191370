from pathlib import Path

import pytest

from server.drafter_store import resolve_drafter, shipped_drafters
from server.errors import DrafterError


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    folder = tmp_path / "shipped" / "tiny-drafter"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder.parent


def test_a_shipped_drafter_is_found_by_name(shipped: Path) -> None:
    assert shipped_drafters(shipped) == ["tiny-drafter"]
    assert resolve_drafter("tiny-drafter", shipped) == shipped / "tiny-drafter"


def test_a_folder_is_taken_as_it_is(shipped: Path, tmp_path: Path) -> None:
    assert resolve_drafter(str(shipped / "tiny-drafter"), tmp_path / "nothing-shipped") == shipped / "tiny-drafter"


def test_an_unknown_drafter_names_those_there_are_and_the_way_without(shipped: Path) -> None:
    with pytest.raises(DrafterError) as caught:
        resolve_drafter("tiny-draft", shipped)
    assert str(caught.value) == (
        "unknown drafter 'tiny-draft', and no such folder; shipped drafters: tiny-drafter; nearest: tiny-drafter; "
        "to serve without one: --no-speculation.enabled"
    )


def test_an_incomplete_drafter_names_what_it_lacks(shipped: Path) -> None:
    (shipped / "tiny-drafter" / "model.safetensors").unlink()
    with pytest.raises(DrafterError, match="tiny-drafter has no model.safetensors"):
        resolve_drafter("tiny-drafter", shipped)
