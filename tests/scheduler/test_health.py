import itertools
from collections.abc import Sequence

from scheduler.health import PATIENCE, DrafterHealth, HealthGuard
from scheduler.policy import Admission, ComingStep, Offer, Source, SurvivalFloor

SLOTS = 4


def guarded(right: Sequence[bool]) -> tuple[HealthGuard, list[int]]:
    """A guard after as many steps as there are entries in ``right``, with drafts as right; tokens drafted per step."""
    guard = HealthGuard(SurvivalFloor(0.0, SLOTS), SLOTS)
    return guard, run(guard, right)


def run(guard: HealthGuard, right: Sequence[bool], coming: ComingStep | None = None) -> list[int]:
    coming = coming or ComingStep(["a", "b"], [9, 9])
    planned = []
    for is_right in right:
        plan = guard.plan(coming)
        planned.append(sum(plan))
        offers = [Offer(([0.5] * length, ())) for length in plan]
        for name, admission in zip(coming.request_ids, guard.admit(coming, offers), strict=True):
            guard.verified(name, admission.tokens, admission.tokens if is_right else 0)
    return planned


def test_a_drafter_that_is_never_right_is_given_up_within_bounds_and_tried_now_and_then() -> None:
    guard, planned = guarded([False] * 100)
    assert not guard.health.is_healthy
    assert sum(map(bool, planned[: PATIENCE // 2])) == PATIENCE // 2  # two drafts a step
    tries = [step for step, tokens in enumerate(planned) if tokens and step > PATIENCE // 2]
    assert tries and set(planned[PATIENCE // 2 + 1 :]) == {0, SLOTS}
    assert all(later - earlier == 24 for earlier, later in itertools.pairwise(tries))


def test_it_is_taken_back_when_it_works_again() -> None:
    guard, _ = guarded([False] * 60)
    planned = run(guard, [True] * 24 * 4)
    assert guard.health.is_healthy
    assert planned[-1] == 2 * SLOTS and planned.count(2 * SLOTS) >= 20


def test_a_drafter_that_is_right_now_and_then_is_kept() -> None:
    guard, planned = guarded([step % 8 == 0 for step in range(200)])
    assert guard.health.is_healthy and set(planned) == {2 * SLOTS}


def test_tries_are_verified_even_if_the_policy_would_not() -> None:
    guard, _ = guarded([False] * 40)
    guard.inner = SurvivalFloor(1.0, SLOTS)
    coming = ComingStep(["a"], [9])
    assert guard.admit(coming, [Offer(([0.1, 0.1], ()))]) == [Admission(1, Source.DRAFTER)]


def test_requests_that_allow_no_drafts_are_not_tried() -> None:
    guard, _ = guarded([False] * 40)
    limited = ComingStep(["a", "b"], [9, 9], draft_limits=[0, 2])
    assert max(run(guard, [False] * 30, limited)) == 2
    assert set(run(guard, [False] * 30, ComingStep(["a"], [9], draft_limits=[0]))) == {0}


def test_repetitions_say_nothing_about_the_drafter() -> None:
    guard = HealthGuard(SurvivalFloor(0.0, SLOTS), SLOTS)
    coming = ComingStep(["a"], [9])
    for _ in range(2 * PATIENCE):
        guard.admit(coming, [Offer(((), [0.9]))])
        guard.verified("a", 1, 0)
    assert guard.health.is_healthy


def test_drafts_of_which_nothing_was_verified_are_no_evidence() -> None:
    health = DrafterHealth()
    for _ in range(2 * PATIENCE):
        health.note(0, 0)
    assert health.is_healthy
