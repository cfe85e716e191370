from pathlib import Path

import pytest

from drafter.align.prompts import Prompt, Turn, distinct, read_prompts, usable_turn, write_prompts


def test_prompts_survive_a_round_trip(tmp_path: Path) -> None:
    prompts = [Prompt("chat", "Hello there", "Be kind."), Prompt("math", 'A "quote",\na line and \u00e9\u4e2d')]
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert read_prompts(tmp_path / "p.jsonl") == prompts
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_file_is_one_object_a_line(tmp_path: Path) -> None:
    write_prompts(tmp_path / "p.jsonl", [Prompt("chat", "a\nb"), Prompt("code", "caf\u00e9")])
    text = (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert text == '{"category": "chat", "prompt": "a\\nb"}\n{"category": "code", "prompt": "caf\u00e9"}\n'


def test_blank_lines_and_other_keys_are_skipped(tmp_path: Path) -> None:
    text = '\n{"category": "a", "prompt": "x", "id": 7}\n   \n\n{"prompt": " y ", "category": "b"}\n'
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt("a", "x"), Prompt("b", " y ")]


def test_a_line_separator_inside_a_prompt_does_not_end_the_line(tmp_path: Path) -> None:
    prompts = [Prompt("chat", "one\u2028two\x85three")]
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert read_prompts(tmp_path / "p.jsonl") == prompts


@pytest.mark.parametrize(
    "line", ['{"category": "a"}', '{"prompt": "x"}', "[]", "7", '"text"', '{"category": "a", ', "null"]
)
def test_a_line_of_another_kind_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"category": "a", "prompt": "x"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="expected") as caught:
        read_prompts(path)
    assert str(caught.value) == f'{path}:3: expected {{"category": \u2026, "prompt": \u2026}}, got {line!r}'


@pytest.mark.parametrize(
    "line",
    [
        '{"category": 1, "prompt": "x"}',
        '{"category": "a", "prompt": ["x"]}',
        '{"category": "a", "prompt": "  "}',
        '{"category": "", "prompt": "x"}',
        '{"category": "a/b", "prompt": "x"}',
    ],
)
def test_values_that_cannot_be_used_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{path}:1: category and prompt must be non-empty strings"):
        read_prompts(path)


def test_a_system_prompt_is_text_if_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"category": "a", "prompt": "x", "system": 7}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="p.jsonl:1: system must be a non-empty string, not 7"):
        read_prompts(path)


def test_a_conversation_is_the_system_prompt_and_the_users_turn() -> None:
    assert Prompt("a", "x").turns == (Turn("user", "x"),)
    assert Prompt("a", "x", "s").turns == (Turn("system", "s"), Turn("user", "x"))


def test_prompts_that_differ_in_case_and_spaces_are_the_same() -> None:
    prompts = [Prompt("a", "One two"), Prompt("b", "three"), Prompt("c", " one  TWO\n"), Prompt("a", "onetwo")]
    assert distinct(prompts) == [0, 1, 3]


def test_a_missing_file_is_the_callers_to_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  What is a cat?\n", "What is a cat?"),
        ("", None),
        (" \n", None),
        ("Hi there", None),
        ("no no no no no no no no", None),
        ("a b a b a", "a b a b a"),
        ("a b a b a b", None),
    ],
)
def test_only_turns_that_ask_something_are_used(text: str, expected: str | None) -> None:
    assert usable_turn(text) == expected
