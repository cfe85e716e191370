import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from drafter.align.provenance import (
    CheckpointFile,
    PromptFile,
    Provenance,
    checkpoint_file,
    commit,
    prompt_file,
    versions,
    without_folders,
)
from drafter.errors import DrafterCheckpointError


def test_everything_is_written_as_json(tmp_path: Path) -> None:
    provenance = Provenance(
        command=["slipstream", "align"],
        target="tiny",
        prompts=PromptFile("p.jsonl", "ab" * 32, 7),
        own_prompts=0,
        corpus={"answers": 3, "tokens": 40},
        training={"steps": 5, "copied_layers": (1, 2)},
        seconds=1.5,
        result={"all": 1.8},
        sampled_result={},
        versions={"python": "3.11"},
        commit=None,
    )
    provenance.write(tmp_path / "provenance.json")
    assert json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8")) == {
        "command": ["slipstream", "align"],
        "target": "tiny",
        "prompts": {"name": "p.jsonl", "sha256": "ab" * 32, "prompts": 7},
        "own_prompts": 0,
        "corpus": {"answers": 3, "tokens": 40},
        "training": {"steps": 5, "copied_layers": [1, 2]},
        "seconds": 1.5,
        "result": {"all": 1.8},
        "sampled_result": {},
        "versions": {"python": "3.11"},
        "commit": None,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["provenance.json"]


def test_a_prompt_file_is_known_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "p.jsonl").write_bytes(b"content\n")
    expected = PromptFile("p.jsonl", hashlib.sha256(b"content\n").hexdigest(), 3)
    assert prompt_file(tmp_path / "deep" / "p.jsonl", 3) == expected


def test_a_checkpoint_is_known_by_name_and_content(tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    (folder / "config.json").write_bytes(b"{}")
    assert checkpoint_file(folder) == CheckpointFile("drafter", hashlib.sha256(b"one").hexdigest())
    (folder / "slipstream.safetensors").write_bytes(b"two")
    assert checkpoint_file(folder).sha256 == hashlib.sha256(b"onetwo").hexdigest()


def test_a_folder_without_tensors_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DrafterCheckpointError, match=f"{tmp_path} is not a drafter checkpoint"):
        checkpoint_file(tmp_path)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/home/me/p.jsonl", "p.jsonl"),
        ("~/runs/one", "one"),
        ("../data/p.jsonl", "p.jsonl"),
        ("align", "align"),
        ("--steps", "--steps"),
        ("0.5", "0.5"),
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("--prompts=/home/me/p.jsonl", "--prompts=p.jsonl"),
    ],
)
def test_a_command_line_tells_nothing_of_folders(word: str, expected: str) -> None:
    assert without_folders(["slipstream", word]) == ["slipstream", expected]


def test_versions_of_what_took_part() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == version("torch") == torch.__version__
    assert found["safetensors"] == version("safetensors")
    assert found["processor"]
    assert not {name for name in found if not found[name]}


def fake_git(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    git = folder / "git"
    git.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_the_commit_is_gits_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_git(tmp_path, "echo 0123abc-dirty", monkeypatch)
    assert commit() == "0123abc-dirty"


def test_outside_of_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_git(tmp_path, "echo fatal: not a git repository >&2; exit 128", monkeypatch)
    assert commit() is None


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
