import logging
from pathlib import Path

import pytest

from scheduler.cost import StepLoad
from scheduler.fixed_policies import FixedLength
from scheduler.policy import Admission, ComingStep, Offer, Source
from scheduler.recording import SOURCES, RecordingPolicy
from scheduler.trace import DraftRecord, TraceHeader, TraceWriter, read_trace

HEADER = TraceHeader(4, SOURCES, "target", "drafter", "fixed:4")


class Told(FixedLength):
    """Keeps what it is told."""

    def __init__(self, length: int):
        super().__init__(length)
        self.told: list[object] = []

    def verified(self, request_id: str, verified: int, accepted: int) -> None:
        self.told.append((request_id, verified, accepted))

    def step_took(self, load: StepLoad, seconds: float) -> None:
        self.told.append((load, seconds))

    def finished(self, request_id: str) -> None:
        self.told.append(request_id)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def recording(folder: Path, length: int = 4) -> tuple[RecordingPolicy, Told, Clock]:
    inner, clock = Told(length), Clock()
    return RecordingPolicy(inner, TraceWriter(folder / "trace", HEADER), clock), inner, clock


def recorded(folder: Path) -> list[DraftRecord]:
    return read_trace(folder / "trace").drafts


def test_drafts_are_recorded_with_what_became_of_them(tmp_path: Path) -> None:
    policy, _, clock = recording(tmp_path)
    coming = ComingStep(["a", "b", "c"], [10, 20, 30])
    offers = [Offer(([0.9, 0.5], ())), Offer(([0.9, 0.1], [0.9, 0.8])), Offer()]
    admissions = policy.admit(coming, offers)
    assert admissions == [Admission(2), Admission(2, Source.REPETITION), Admission()]
    clock.now = 101.5
    policy.verified("b", 2, 2)
    clock.now = 102.0
    policy.verified("a", 2, 1)
    policy.verified("c", 0, 0)
    policy.close()
    assert recorded(tmp_path) == [
        DraftRecord("b", 1.5, 20, ((0.9, 0.1), (0.9, 0.8)), 1, 2, 2),
        DraftRecord("a", 2.0, 10, ((0.9, 0.5), ()), 0, 2, 1),
    ]


def test_a_draft_of_which_nothing_is_verified_is_recorded_as_the_more_promising_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, inner, _ = recording(tmp_path)
    monkeypatch.setattr(inner, "admit", lambda coming, offers: [Admission()])
    policy.admit(ComingStep(["a"], [10]), [Offer(([0.4], [0.5]))])
    policy.verified("a", 0, 0)
    policy.close()
    (draft,) = recorded(tmp_path)
    assert (draft.source, draft.verified, draft.censored) == (1, 0, True)


def test_tokens_beyond_the_limit_of_a_request_are_not_part_of_its_draft(tmp_path: Path) -> None:
    policy, _, _ = recording(tmp_path)
    policy.admit(ComingStep(["a", "b"], [10, 11], draft_limits=[2, 0]), [Offer(([0.9, 0.5, 0.4], [0.1] * 3))] * 2)
    policy.verified("a", 2, 2)
    policy.verified("b", 0, 0)
    policy.close()
    assert recorded(tmp_path) == [DraftRecord("a", 0.0, 10, ((0.9, 0.5), (0.1, 0.1)), 0, 2, 2)]


def test_a_draft_without_an_outcome_is_forgotten(tmp_path: Path) -> None:
    policy, _, _ = recording(tmp_path)
    coming = ComingStep(["a", "b"], [10, 11])
    policy.admit(coming, [Offer(([0.9], ()))] * 2)
    policy.finished("a")
    policy.admit(coming, [Offer()] * 2)
    policy.verified("a", 1, 1)
    policy.verified("b", 1, 1)
    policy.close()
    assert recorded(tmp_path) == []


def test_the_policy_inside_decides_and_is_told_everything(tmp_path: Path) -> None:
    policy, inner, _ = recording(tmp_path, length=3)
    coming = ComingStep(["a"], [10])
    assert policy.plan(coming) == [3]
    assert policy.admit(coming, [Offer(([0.9] * 4, ()))]) == [Admission(3)]
    load = StepLoad(4, 1, 10, 0, 0)
    policy.verified("a", 3, 2)
    policy.step_took(load, 0.5)
    policy.finished("a")
    assert inner.told == [("a", 3, 2), (load, 0.5), "a"]
    policy.close()


def test_a_full_disk_ends_the_recording_and_not_the_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy, inner, _ = recording(tmp_path)
    coming, offers = ComingStep(["a"], [10]), [Offer(([0.9], ()))]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TraceWriter, "_write", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert policy.admit(coming, offers) == [Admission(1)]
            policy.verified("a", 1, 1)
    (message,) = caplog.messages
    assert message == (
        f"cannot write the trace {tmp_path / 'trace'}: No space left on device; nothing is recorded from here on"
    )
    assert inner.told == [("a", 1, 1)] * 3
    policy.close()
