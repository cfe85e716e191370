import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.trace import DraftRecord, Trace, TraceError, TraceHeader, TraceWriter, read_trace

HEADER = TraceHeader(3, ("drafter", "repetition"), "smollm2", "block-5", "fixed:3", {"temperature": 0.5, "deep": [1]})
DRAFTS = [
    DraftRecord("a", 0.25, 17, ((0.9, 0.5, 0.5), ()), 0, 3, 1),
    DraftRecord("b", 0.5, 1024, ((1.0,), (0.75, 0.0)), 1, 2, 2),
    DraftRecord("a", 0.5, 19, ((), (0.25,)), 1, 0, 0),
]


def write(path: Path, drafts: list[DraftRecord] = DRAFTS) -> Path:
    with TraceWriter(path, HEADER) as writer:
        for draft in drafts:
            writer.write(draft)
    return path


def complaint(path: Path) -> str:
    """What is said of a trace that cannot be read: one line, which names the file."""
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path / "trace")) == Trace(HEADER, DRAFTS)


def test_a_trace_may_be_empty(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path / "trace", [])) == Trace(HEADER, [])


SURVIVAL = st.lists(st.floats(0, 1), max_size=3).map(lambda values: tuple(sorted(values, reverse=True)))


@settings(deadline=None)  # the disk may be busy
@given(SURVIVAL, SURVIVAL, st.floats(0, 1e6), st.text(), st.integers(0, 1), st.data())
def test_any_draft_survives_rounded(
    tmp_path_factory: pytest.TempPathFactory,
    drafted: tuple[float, ...],
    repeated: tuple[float, ...],
    seconds: float,
    name: str,
    source: int,
    data: st.DataObject,
) -> None:
    verified = data.draw(st.integers(0, len((drafted, repeated)[source])))
    draft = DraftRecord(name, seconds, 5, (drafted, repeated), source, verified, data.draw(st.integers(0, verified)))
    (read,) = read_trace(write(tmp_path_factory.mktemp("trace") / "trace", [draft])).drafts
    assert (read.request, read.verified, read.accepted) == (name, draft.verified, draft.accepted)
    assert read.seconds == pytest.approx(seconds, abs=1e-6)
    for before, after in zip(draft.survival, read.survival, strict=True):
        assert after == pytest.approx(before, abs=1e-6)


def test_outcomes_are_unknown_where_all_that_was_verified_was_accepted_and_there_was_more() -> None:
    survival = ((0.9, 0.8, 0.7), (0.1,))
    known = [(0, 3, 3), (0, 3, 0), (0, 2, 1), (1, 1, 1)]
    unknown = [(0, 2, 2), (0, 0, 0), (1, 0, 0)]
    drafts = [DraftRecord("a", 0, 1, survival, *rest) for rest in known + unknown]
    assert [draft.censored for draft in drafts] == [False] * 4 + [True] * 3
    assert Trace(HEADER, drafts).censored == 3


def test_an_older_trace_is_not_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path / "trace")
    with pytest.raises(TraceError, match="exists already; a trace is written to a new file"):
        TraceWriter(path, HEADER)
    assert len(read_trace(path).drafts) == 3


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=f"cannot write the trace {tmp_path}/none/trace: No such file or directory"):
        TraceWriter(tmp_path / "none" / "trace", HEADER)


def test_a_full_disk_is_named_when_the_buffer_is_written(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace", HEADER)
    writer._file.close()
    writer._file = Path("/dev/full").open("w")  # noqa: SIM115
    writer.write(DRAFTS[0])
    with pytest.raises(TraceError, match="cannot write the trace .*: No space left on device"):
        writer.close()


def test_lines_reach_the_file_when_the_buffer_is_full_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    writer = TraceWriter(path, HEADER)
    assert read_trace(path).drafts == []  # the header does not wait
    for _ in range(1000):
        writer.write(DRAFTS[0])
    assert 100 < path.read_text().count("\n") < 1001
    writer.close()
    writer.close()
    assert len(read_trace(path).drafts) == 1000


def test_a_trace_that_was_cut_off_names_the_line_wherever_the_cut_is(tmp_path: Path) -> None:
    text = write(tmp_path / "whole").read_text()
    end = text.rindex("\n", 0, -1) + 1
    path = tmp_path / "cut"
    for length in range(end + 1, len(text)):
        path.write_text(text[:length])
        assert complaint(path) == f"{path}:4: the file ends in the middle of this line; the trace was cut off here"
    path.write_text(text[:end])
    assert len(read_trace(path).drafts) == 2


def test_what_is_no_trace_at_all(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    assert complaint(path) == f"cannot read the trace {path}: No such file or directory"
    path.write_bytes(b"")
    assert complaint(path) == f"{path} is not a trace: it is empty, a header was expected"
    path.write_bytes(b"\xff\xfe\x00")
    assert complaint(path) == f"{path} is not a trace: it is not UTF-8 text"
    for text in ("prompt\n", "[1]\n", '{"schema": "other"}\n', "[" * 100_000):
        path.write_text(text)
        expected = 'a JSON object with "schema": "slipstream-trace" was expected'
        assert complaint(path) == f"{path}:1: not a trace: {expected}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2 of the trace format; version 1 is read"),
        ({"slots": 0}, "slots is 0; a whole number from 1 was expected"),
        ({"slots": True}, "slots is true; a whole number from 1 was expected"),
        ({"sources": []}, "sources is []; a list of names was expected"),
        ({"sources": [1]}, "sources is [1]; a list of names was expected"),
        ({"target": None}, "target is null; a text was expected"),
        ({"settings": 3}, "settings is 3; an object was expected"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "trace")
    header, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps({**json.loads(header), **changes}) + "\n" + "".join(rest))
    assert complaint(path) == f"{path}:1: {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request": 7}, "request is 7; a text was expected"),
        ({"seconds": -0.5}, "seconds is -0.5; a finite number from 0 was expected"),
        ({"seconds": math.inf}, "seconds is Infinity; a finite number from 0 was expected"),
        ({"seconds": "1"}, 'seconds is "1"; a finite number from 0 was expected'),
        ({"context": 1.5}, "context is 1.5; a whole number from 0 was expected"),
        ({"survival": [[0.5]]}, "survival is [[0.5]]; a list for each of ['drafter', 'repetition'] was expected"),
        ({"survival": [0.5, []]}, "survival of the drafter is 0.5; a list of probabilities was expected"),
        (
            {"survival": [[0.5, 0.6], []]},
            "survival of the drafter rises from 0.5 to 0.6; it can only fall along a draft",
        ),
        ({"survival": [[1.5], []]}, "survival of the drafter has 1.5; a probability from 0 to 1 was expected"),
        ({"survival": [[], [math.nan]]}, "survival of the repetition has NaN; a probability from 0 to 1 was expected"),
        ({"survival": [[True], []]}, "survival of the drafter has true; a probability from 0 to 1 was expected"),
        ({"survival": [[0.1] * 4, []]}, "survival of the drafter has 4 draft tokens; at most 3 were expected"),
        ({"source": 2}, "source is 2; a whole number from 0 to 1 was expected"),
        ({"source": 1}, "3 draft tokens verified of 0 from the repetition"),
        ({"verified": 4}, "4 draft tokens verified of 3 from the drafter"),
        ({"verified": -1}, "verified is -1; a whole number from 0 was expected"),
        ({"accepted": 4}, "4 draft tokens accepted of 3 verified"),
        ({"accepted": None}, "accepted is null; a whole number from 0 was expected"),
        (
            {"survival": "x" * 99},
            f"survival is \"{'x' * 56}...; a list for each of ['drafter', 'repetition'] was expected",
        ),
    ],
)
def test_values_that_cannot_be_are_named_with_their_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "trace")
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = json.dumps({**json.loads(lines[1]), **changes}) + "\n"
    path.write_text("".join(lines))
    assert complaint(path) == f"{path}:2: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [("[1, 2]", "a JSON object was expected, not [1, 2]"), ("{1}", "not JSON: "), ("", "not JSON: ")],
)
def test_lines_that_are_no_drafts_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "trace")
    path.write_text(path.read_text() + line + "\n")
    assert complaint(path).startswith(f"{path}:5: {message}")
