import os
import struct
from pathlib import Path
from typing import Any

import pytest

from drafter.align.plot import plot_history

HISTORY: list[dict[str, Any]] = [
    {"step": 5, "seconds": 30.0, "loss": 5.5, "emitted_per_verify_step": {"all": 1.1, "chat": 1.0}},
    {"step": 10, "seconds": 60.0, "loss": 4.5, "emitted_per_verify_step": {"all": 1.4, "chat": 1.2, "math": 1.6}},
]


@pytest.mark.parametrize("entries", [1, 2])
def test_a_png_is_drawn(tmp_path: Path, entries: int) -> None:
    plot_history(HISTORY[-entries:], tmp_path / "run.png")
    content = (tmp_path / "run.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1320, 504)
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]


def test_the_picture_follows_the_history(tmp_path: Path) -> None:
    contents = []
    for entries in (1, 2):
        plot_history(HISTORY[:entries], tmp_path / "run.png")
        contents.append((tmp_path / "run.png").read_bytes())
    assert contents[0] != contents[1]


def test_an_older_picture_stays_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.png").write_bytes(b"older")

    def interrupted(source: Path, target: Path) -> None:
        assert source.read_bytes().startswith(b"\x89PNG") and target == tmp_path / "run.png"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plot_history(HISTORY, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes() == b"older"


def test_no_figure_is_left_open(tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    plot_history(HISTORY, tmp_path / "run.png")
    assert plt.get_fignums() == []
