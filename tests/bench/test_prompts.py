import hashlib
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.prompts import load_prompts

GOOD = '{"category": "math", "prompt": "1+1?"}'


def write(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes("\n".join(lines).encode())
    return path


def test_categories_and_prompts_keep_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"category": "code", "prompt": "b"}',
        "",
        '{"category": "chat", "prompt": "a", "source": "kept for others"}',
        '{"category": "code", "prompt": "a"}',
    )
    prompts = load_prompts(path)
    assert list(prompts.categories.items()) == [("code", ("b", "a")), ("chat", ("a",))]
    assert prompts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert prompts.name == "prompts.jsonl"


def test_limit_counts_for_each_category(tmp_path: Path) -> None:
    lines = [f'{{"category": "{name}", "prompt": "{number}"}}' for number in range(3) for name in "ab"]
    assert dict(load_prompts(write(tmp_path, *lines), limit=2).categories) == {"a": ("0", "1"), "b": ("0", "1")}


def test_mixed_prompts_are_taken_from_the_categories_in_turn(tmp_path: Path) -> None:
    lines = [f'{{"category": "{name}", "prompt": "{name}{number}"}}' for name in "ab" for number in range(3)]
    prompts = load_prompts(write(tmp_path, *lines, '{"category": "c", "prompt": "c0"}')).mixed()
    assert dict(prompts.categories) == {"mixed": ("a0", "b0", "c0", "a1", "b1", "a2", "b2")}


def test_each_category_must_fill_the_requests_in_flight(tmp_path: Path) -> None:
    lines = [f'{{"category": "{name}", "prompt": "1"}}' for name in "aab"]
    prompts = load_prompts(write(tmp_path, *lines))
    prompts.check_fills(1)
    with pytest.raises(BenchError, match=r"^--concurrency 2: of category b there are only 1 prompts, "):
        prompts.check_fills(2)
    prompts.mixed().check_fills(3)


def test_line_separators_inside_of_strings_do_not_break_lines(tmp_path: Path) -> None:
    path = write(tmp_path, '{"category": "chat", "prompt": "a\u2028b"}', "{")
    with pytest.raises(BenchError, match=r"jsonl:2: "):
        load_prompts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"category": "math"', r":2: not a JSON object: Expecting ',' delimiter at column 20"),
        ('["math", "1+1?"]', ":2: expected a JSON object, got list"),
        ('{"prompt": "1+1?"}', ':2: "category" must be a non-empty string, it is missing'),
        ('{"category": "math", "prompt": 5}', ':2: "prompt" must be a non-empty string, it is 5'),
        ('{"category": "math", "prompt": "  "}', ':2: "prompt" must be a non-empty string, it is "  "'),
        ('{"category": "all", "prompt": "x"}', ':2: the category "all" is reserved'),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, GOOD, line)
    with pytest.raises(BenchError) as error:
        load_prompts(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_a_folder_and_an_empty_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot read the prompt file .*: No such file"):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(BenchError, match="cannot read the prompt file .*: Is a directory"):
        load_prompts(tmp_path)
    with pytest.raises(BenchError, match="has no prompts"):
        load_prompts(write(tmp_path, "", " "))


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n\xff\n")
    with pytest.raises(BenchError, match=r"jsonl:3: not UTF-8 text"):
        load_prompts(path)
