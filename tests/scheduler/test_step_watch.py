from scheduler.cost import StepLoad
from scheduler.step_watch import StepWatch


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_step_is_told_once_with_its_time_and_its_drafts() -> None:
    clock = Clock()
    watch = StepWatch(clock)
    watch.start(7, 2, 300)
    clock.now = 0.25
    watch.stop()
    clock.now = 1.0
    watch.drafted([3, 0, 2])
    assert watch.take() == (StepLoad(7, 2, 300, 2, 5), 0.25)
    assert watch.take() is None


def test_a_step_without_drafts_has_none() -> None:
    clock = Clock()
    watch = StepWatch(clock)
    watch.start(1, 1, 9)
    clock.now = 0.5
    watch.stop()
    assert watch.take() == (StepLoad(1, 1, 9, 0, 0), 0.5)


def test_what_earlier_steps_had_put_off_is_not_this_ones_work() -> None:
    clock = Clock()
    watch = StepWatch(clock)
    watch.start(1, 1, 9)
    clock.now = 0.5
    watch.stop()
    watch.drafted([4], late_seconds=0.125)
    assert watch.take() == (StepLoad(1, 1, 9, 1, 4), 0.375)


def test_what_never_ended_or_never_began_is_not_told() -> None:
    watch = StepWatch(Clock())
    watch.stop()
    watch.drafted([1])
    assert watch.take() is None
    watch.start(1, 1, 1)
    assert watch.take() is None
