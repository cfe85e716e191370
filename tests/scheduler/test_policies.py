import json
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.adaptive import AdaptivePolicy
from scheduler.cost import StepLoad
from scheduler.options import PolicyName, PolicyOptions
from scheduler.policies import keep_costs, make_policy
from scheduler.policy import Admission, ComingStep, Offer, Source

LOAD = StepLoad(2, 1, 100, 0, 0)


def options(path: Path, identity: str = "this machine") -> PolicyOptions:
    return PolicyOptions(cost_file=path / "costs" / "a.json", cost_identity=identity)


def learned(path: Path) -> AdaptivePolicy:
    policy = make_policy(options(path), 4, 64)
    assert isinstance(policy, AdaptivePolicy)
    for _ in range(30):
        policy.step_took(LOAD, 0.123)
    return policy


def test_step_times_outlive_the_engine(tmp_path: Path) -> None:
    policy = learned(tmp_path)
    keep_costs(options(tmp_path), policy)
    again = make_policy(options(tmp_path), 4, 64)
    assert again.predicted_seconds(LOAD) == policy.predicted_seconds(LOAD)


@pytest.mark.parametrize("damage", ["another machine", "another size", "truncated", "no JSON object", "negative times"])
def test_step_times_that_are_not_ours_are_learned_anew(tmp_path: Path, damage: str) -> None:
    keep_costs(options(tmp_path), learned(tmp_path))
    path = tmp_path / "costs" / "a.json"
    text = path.read_text()
    if damage == "truncated":
        path.write_text(text[: len(text) // 2])
    if damage == "no JSON object":
        path.write_text("[1]")
    if damage == "negative times":
        saved = json.loads(text)
        saved["model"]["terms"] = [-term for term in saved["model"]["terms"]]
        path.write_text(json.dumps(saved))
    identity = "that machine" if damage == "another machine" else "this machine"
    policy = make_policy(options(tmp_path, identity), 4, 128 if damage == "another size" else 64)
    assert isinstance(policy, AdaptivePolicy) and policy.cost.observations == 0


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "costs").write_text("in the way")
    keep_costs(options(tmp_path), learned(tmp_path))
    assert "step times are not saved" in caplog.text


def test_nothing_is_kept_of_what_was_never_learned(tmp_path: Path) -> None:
    keep_costs(options(tmp_path), make_policy(options(tmp_path), 4, 64))
    keep_costs(replace(options(tmp_path), cost_file=None), learned(tmp_path))
    assert not (tmp_path / "costs").exists()


@pytest.mark.parametrize(
    ("name", "floor", "expected"), [(PolicyName.FIXED, 0.9, 3), (PolicyName.FLOOR, 0.4, 2), (PolicyName.FLOOR, 0.9, 0)]
)
def test_policies_by_name(name: PolicyName, floor: float, expected: int) -> None:
    policy = make_policy(PolicyOptions(name=name, survival_floor=floor), 4, 64)
    coming = ComingStep(["a"], [9])
    assert policy.plan(coming) == [4]
    assert policy.admit(coming, [Offer(([0.6, 0.5, 0.1], ()))]) == [Admission(expected, Source.DRAFTER)]
