"""The acceptance model on made-up truths."""

import numpy as np
import pytest

from scheduler.acceptance import AcceptanceModel

SLOTS = 4


class Truth:
    """Accepts slot by slot with a logistic law of the confidence: ``slope * logit(confidence) + shift``."""

    def __init__(self, slope: float, shift: float, seed: int = 0):
        self.slope, self.shift = slope, shift
        self.random = np.random.default_rng(seed)

    def chances(self, confidences: np.ndarray) -> np.ndarray:
        odds = self.slope * np.log(confidences / (1 - confidences)) + self.shift
        return np.asarray(1 / (1 + np.exp(-odds)), dtype=np.float64)

    def teach(self, model: AcceptanceModel, drafts: int, request: str | None = None, verified: int = SLOTS) -> None:
        """Drafts of one request, or of one after the other."""
        for draft in range(drafts):
            confidences = self.random.uniform(0.1, 0.95, SLOTS)
            right = self.random.random(SLOTS) < self.chances(confidences)
            name = request or f"r{draft}"
            model.observe(name, confidences, verified, int(np.cumprod(right[:verified]).sum()), 200)
            if request is None:
                model.finished(name)


def survival(model: AcceptanceModel, confidences: np.ndarray, request: str = "new") -> np.ndarray:
    result: np.ndarray = model.survival([request], confidences[None], np.array([len(confidences)]), np.array([200]))[0]
    return result


def test_it_begins_with_the_drafters_own_probabilities() -> None:
    confidences = np.array([0.9, 0.5, 0.2])
    # A little flatter: nothing is known for sure yet.
    np.testing.assert_allclose(survival(AcceptanceModel(SLOTS), confidences), np.cumprod(confidences), atol=0.05)


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (0.5, -0.5), (1.5, 0.7)])
def test_a_drafter_that_errs_in_the_same_way_is_calibrated(slope: float, shift: float) -> None:
    model, truth = AcceptanceModel(SLOTS), Truth(slope, shift)
    truth.teach(model, 3000)
    for confidence in (0.3, 0.6, 0.9):
        row = np.full(SLOTS, confidence)
        expected = np.cumprod(truth.chances(row))
        np.testing.assert_allclose(survival(model, row), expected, atol=0.08)
    assert model.calibration_error < 0.05


def test_what_lies_behind_a_rejection_is_not_held_against_it() -> None:
    """Were those slots counted as rejected, later positions would seem hopeless."""
    model, truth = AcceptanceModel(SLOTS), Truth(1.0, 0.0)
    truth.teach(model, 3000)
    row = np.full(SLOTS, 0.5)
    conditional = survival(model, row)[1:] / survival(model, row)[:-1]
    assert conditional.min() > 0.4


def test_a_collapse_is_noticed_and_so_is_a_recovery() -> None:
    model = AcceptanceModel(SLOTS)
    Truth(1.0, 1.0).teach(model, 500)
    row = np.array([0.7])
    assert survival(model, row)[0] > 0.6
    Truth(1.0, -9.0).teach(model, 150)
    assert survival(model, row)[0] < 0.1
    Truth(1.0, 1.0).teach(model, 200)
    assert survival(model, row)[0] > 0.5


def test_lessons_are_counted_in_steps_whether_they_predict_or_not() -> None:
    model, truth = AcceptanceModel(SLOTS), Truth(1.0, 0.0)
    truth.teach(model, 1000)
    row = np.full(SLOTS, 0.9)
    survival(model, row, "a")  # a lesson is behind it, and the next one eight steps away
    before = survival(model, row, "a")
    for _ in range(3):
        model.observe("a", row, SLOTS, 0, 200)
    np.testing.assert_array_equal(survival(model, row, "a"), before)
    for _ in range(8):
        model.skip()
    assert survival(model, row, "a")[0] < before[0] - 0.02


def test_requests_have_a_history_of_their_own() -> None:
    model = AcceptanceModel(SLOTS)
    for _ in range(100):
        Truth(1.0, 2.0).teach(model, 1, "easy")
        model.observe("hard", np.full(SLOTS, 0.6), SLOTS, 0, 200)
    row = np.array([0.6])
    assert survival(model, row, "easy")[0] > survival(model, row)[0] > survival(model, row, "hard")[0]
    model.finished("hard")
    assert survival(model, row, "hard")[0] == survival(model, row)[0]


def test_it_falls_along_a_draft_and_ends_with_it() -> None:
    model = AcceptanceModel(SLOTS)
    confidences = np.array([[0.9, 1.0, 0.0, 0.5], [0.5, np.nan, 0.5, 0.5]])
    result = model.survival(["a", "b"], confidences, np.array([4, 2]), np.array([1, 10_000]))
    assert result.shape == (2, 4) and np.isfinite(result).all()
    assert (np.diff(result, axis=1) <= 0).all() and (result[1, 2:] == 0).all()


def test_drafts_that_do_not_exist_yet_are_expected_by_the_base_rates() -> None:
    model = AcceptanceModel(SLOTS)
    for _ in range(300):
        model.observe("r", np.full(SLOTS, np.nan), SLOTS, 1, 200)
    first, second = model.expected(["new"], np.array([200]), 2)[0]
    assert first > 0.8 and second < 0.2


@pytest.mark.parametrize(("verified", "accepted"), [(5, 0), (2, 3), (1, -1)])
def test_impossible_outcomes_are_refused(verified: int, accepted: int) -> None:
    with pytest.raises(ValueError, match="accepted of"):
        AcceptanceModel(SLOTS).observe("r", np.full(SLOTS, 0.5), verified, accepted, 10)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="confidences have shape"):
        AcceptanceModel(SLOTS).survival(["r"], np.zeros((1, 9)), np.array([1]), np.array([1]))
