from pathlib import Path
from typing import Any

import pytest

from drafter.align.card import write_card
from drafter.align.provenance import PromptFile, Provenance


def card(folder: Path, initial: dict[str, Any] | None, prompts: PromptFile | None = None, own_prompts: int = 0) -> str:
    provenance = Provenance(
        command=["slipstream", "align"],
        target="tiny",
        prompts=prompts,
        own_prompts=own_prompts,
        corpus={"answers": 1300, "answer_tokens": 40000},
        training={"steps": 2500, "initial": initial},
        seconds=120.0,
        result={"all": 1.8, "chat": 1.456},
        sampled_result={"all": 1.6},
        versions={"processor": "a processor"},
        commit=None,
    )
    write_card(folder / "README.md", provenance, 12_700_000, "a licence")
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_card_says_what_went_in_and_what_came_out(tmp_path: Path) -> None:
    text = card(tmp_path, None, PromptFile("p.jsonl", "ab" * 32, 6118))
    assert "| parameters | 12.7 million;" in text
    assert "1,300 answers of the target, 40,000 tokens" in text and "6,118 from `p.jsonl`" in text
    assert "| training | 2,500 steps, 2 minutes on a processor |" in text
    assert "| all | 1.80 | 1.60 |" in text and "| chat | 1.46 |  |" in text and "| licence | a licence |" in text


@pytest.mark.parametrize("initial", [{"name": "first", "sha256": "ab" * 32}], ids=["from a checkpoint"])
def test_a_card_names_the_drafter_that_training_went_on_from(tmp_path: Path, initial: dict[str, Any]) -> None:
    text = card(tmp_path, initial, own_prompts=4000)
    assert "2 minutes on a processor, going on from the drafter `first` |" in text
    assert "prompts: 4,000 written by the target itself" in text


def test_a_card_names_both_kinds_of_prompts(tmp_path: Path) -> None:
    text = card(tmp_path, None, PromptFile("p.jsonl", "ab" * 32, 6118), own_prompts=3000)
    assert "prompts: 6,118 from `p.jsonl`, 3,000 written by the target itself |" in text
