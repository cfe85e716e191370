import pytest
import torch

from drafter.thresholds import FixedThreshold, OneShotThresholds, PassRecord


def record(tokens: list[int], probabilities: list[float], predicted: list[bool] | None = None) -> PassRecord:
    return PassRecord(tokens, probabilities, predicted or [True] * len(tokens))


def calibrated(**options: float) -> OneShotThresholds:
    """After one request whose target agreed with first-pass tokens of 0.5, 0.6, 0.9 in slot 0 and 0.2 in slot 1."""
    thresholds = OneShotThresholds(0.9, **options)  # type: ignore[arg-type]
    for probability, emitted in ((0.5, [7]), (0.99, [6]), (0.6, [7, 9]), (0.9, [7, 8, 1])):
        thresholds.proposed("a", [record([7, 8], [probability, 0.2])])
        thresholds.emitted("a", emitted)
    thresholds.finished(["a"])
    return thresholds


def test_a_fixed_threshold_is_the_same_everywhere() -> None:
    thresholds = FixedThreshold(0.75)
    assert thresholds.at(1, ["a", "b"], 3).tolist() == [[0.75] * 3] * 2
    assert thresholds.at(5, ["a"], 1).tolist() == [[0.75]]


def test_before_calibration_the_fallback_holds() -> None:
    thresholds = OneShotThresholds(0.75)
    thresholds.proposed("a", [record([7, 8], [0.1, 0.2])])
    thresholds.emitted("a", [7, 8, 9])
    assert thresholds.at(1, ["a", "b"], 2).tolist() == [[0.75] * 2] * 2
    assert thresholds.wants("a") and thresholds.wants("b")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cap": 1.0, "slack": 0.0}, [0.6, 0.2]),
        ({"cap": 1.0, "slack": 0.0, "quantile": 0.0}, [0.5, 0.2]),
        ({"cap": 1.0, "slack": 0.0, "quantile": 0.75}, [0.75, 0.2]),
        ({"cap": 0.55, "slack": 0.0}, [0.55, 0.2]),
        ({"cap": 1.0, "slack": 0.25}, [0.45, 0.15]),
        ({"cap": 0.5, "slack": 0.1}, [0.45, 0.18]),
    ],
    ids=str,
)
def test_the_first_finished_request_sets_the_thresholds(options: dict[str, float], expected: list[float]) -> None:
    thresholds = calibrated(**options)
    for request_id in ("a", "another"):
        assert not thresholds.wants(request_id)
        # Nothing was right in slot 2, nor in a second pass.
        assert thresholds.at(1, [request_id], 3)[0].tolist() == pytest.approx([*expected, 0.9])
        assert thresholds.at(2, [request_id], 2)[0].tolist() == pytest.approx([0.9, 0.9])


def test_passes_have_thresholds_of_their_own_and_observed_tokens_count_once() -> None:
    thresholds = OneShotThresholds(0.9, cap=1.0, slack=0.0)
    first = record([7, 3, 4], [0.8, 0.1, 0.2])
    second = record([7, 8, 5], [0.7, 0.4, 0.3], [False, True, True])
    thresholds.proposed("a", [first, second])
    thresholds.emitted("a", [7, 8, 4])
    thresholds.finished(["a"])
    # The first pass was right about slots 0 and 2, the second about slot 1; slot 0 it had not predicted.
    torch.testing.assert_close(thresholds.at(1, ["b"], 3), torch.tensor([[0.8, 0.9, 0.2]]))
    torch.testing.assert_close(thresholds.at(2, ["b"], 3), torch.tensor([[0.9, 0.4, 0.9]]))


def test_the_request_that_finishes_first_decides_once() -> None:
    thresholds = OneShotThresholds(0.9, cap=1.0, slack=0.0)
    for request_id, probability in (("slow", 0.3), ("fast", 0.5)):
        thresholds.proposed(request_id, [record([7], [probability])])
        thresholds.emitted(request_id, [7])
    thresholds.finished(["fast"])
    thresholds.finished(["slow"])
    assert thresholds.at(1, ["c"], 1).tolist() == [[0.5]]


def test_a_request_without_a_right_token_leaves_it_to_the_next() -> None:
    thresholds = OneShotThresholds(0.9, cap=1.0, slack=0.0)
    thresholds.proposed("wrong", [record([7], [0.3])])
    thresholds.emitted("wrong", [8])
    thresholds.finished(["wrong", "never seen"])
    assert thresholds.wants("next")
    thresholds.proposed("next", [record([7], [0.5])])
    thresholds.emitted("next", [7])
    thresholds.finished(["next"])
    assert thresholds.at(1, ["c"], 1).tolist() == [[0.5]]


def test_a_draft_is_compared_with_the_tokens_that_follow_it() -> None:
    """A step that emits nothing, as while a prompt is read again, leaves it waiting; a newer draft replaces it."""
    thresholds = OneShotThresholds(0.9, cap=1.0, slack=0.0)
    thresholds.emitted("a", [7])
    thresholds.proposed("a", [record([7], [0.1])])
    thresholds.proposed("a", [record([7], [0.5])])
    thresholds.emitted("a", [])
    thresholds.emitted("a", [7])
    thresholds.emitted("a", [7, 7])
    thresholds.proposed("a", [record([7], [0.7])])
    thresholds.emitted("a", [7])
    thresholds.finished(["a"])
    assert thresholds.at(1, ["c"], 2)[0].tolist() == pytest.approx([0.6, 0.9])


def test_tasks_are_calibrated_apart() -> None:
    thresholds = OneShotThresholds(0.9, cap=1.0, slack=0.0, task_of=lambda request_id: request_id.split("/")[0])
    for request_id, probability in (("code/1", 0.25), ("chat/1", 0.5)):
        thresholds.proposed(request_id, [record([7], [probability])])
        thresholds.emitted(request_id, [7])
    thresholds.finished(["code/1"])
    assert thresholds.at(1, ["chat/2", "code/2"], 1)[:, 0].tolist() == pytest.approx([0.9, 0.25])
    thresholds.finished(["chat/1"])
    assert thresholds.at(1, ["chat/2", "code/2"], 1)[:, 0].tolist() == pytest.approx([0.5, 0.25])


def test_no_requests_have_no_thresholds() -> None:
    assert OneShotThresholds(0.9).at(1, [], 3).shape == (0, 3)
