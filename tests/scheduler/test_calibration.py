from scheduler.calibration import CalibrationPolicy
from scheduler.cost import CostModel, StepLoad
from scheduler.policy import ComingStep, Offer

SLOTS = 3


def policy(max_requests: int = 8) -> CalibrationPolicy:
    return CalibrationPolicy(CostModel(64), SLOTS, max_requests)


def test_phases_grow_up_to_the_most_requests_and_end() -> None:
    calibration = policy(max_requests=8)
    assert [calibration.next_phase() for _ in range(6)] == [1, 2, 4, 8, 0, 0]
    assert policy(max_requests=1).next_phase() == 1
    many = policy(max_requests=100)
    assert [many.next_phase() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 64, 0]


def test_every_number_of_draft_tokens_is_verified_with_and_without_drafting() -> None:
    calibration, coming = policy(), ComingStep(["a", "b"], [9, 9])
    seen = set()
    for _ in range(calibration.steps_per_phase):
        plan = calibration.plan(coming)
        assert plan in ([0, 0], [SLOTS, SLOTS])
        offers = [Offer(([0.5] * SLOTS, ())) for _ in plan]
        tokens = {admission.tokens for admission in calibration.admit(coming, offers)}
        seen.add((plan[0] > 0, *tokens))
    assert seen == {(drafted, tokens) for drafted in (True, False) for tokens in range(SLOTS + 1)}


def test_no_more_is_verified_than_is_offered() -> None:
    calibration, coming = policy(), ComingStep(["a"], [9])
    for _ in range(12):
        calibration.plan(coming)
        (admission,) = calibration.admit(coming, [Offer(([0.5], ()))])
        assert admission.tokens <= 1


def test_step_times_are_learned() -> None:
    cost = CostModel(64)
    calibration = CalibrationPolicy(cost, SLOTS, 8)
    for _ in range(20):
        calibration.step_took(StepLoad(1, 1, 20, 0, 0), 0.05)
    assert cost.seconds(StepLoad(1, 1, 20, 0, 0)) > 0.04
