import io

from server.progress import ProgressBar, part, silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_it_writes_a_line_for_every_tenth() -> None:
    stream = io.StringIO()
    with ProgressBar("work", stream) as bar:
        for step in range(1001):
            bar(step / 1000, "going")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "work:   0% going"
    assert lines[-1] == "work: 100% going"


def test_a_terminal_gets_one_line_with_the_time_left() -> None:
    stream, clock = Terminal(), Clock()
    with ProgressBar("work", stream, clock) as bar:
        bar(0.0, "going")
        clock.now = 30.0
        bar(0.25, "going")
    frames = stream.getvalue().split("\r")
    assert frames[-1] == f"\x1b[K[{'#' * 6}{'.' * 18}] work:  25% going, 1:30 left\n"
    assert stream.getvalue().count("\n") == 1


def test_a_terminal_is_not_redrawn_more_often_than_the_eye_sees() -> None:
    stream, clock = Terminal(), Clock()
    bar = ProgressBar("work", stream, clock)
    for step in range(1000):
        clock.now = step / 1000
        bar(step / 1000, "going")
    assert stream.getvalue().count("\r") <= 11


def test_it_never_goes_back() -> None:
    stream, clock = Terminal(), Clock()
    bar = ProgressBar("work", stream, clock)
    bar(0.5, "a")
    clock.now = 1.0
    bar(0.2, "b")
    assert " 50% b" in stream.getvalue()


def test_nothing_to_do_shows_nothing() -> None:
    stream = Terminal()
    with ProgressBar("work", stream):
        pass
    assert stream.getvalue() == ""


def test_a_part_is_a_stretch_of_the_whole() -> None:
    seen: list[float] = []
    stage = part(lambda fraction, _: seen.append(fraction), 0.4, 0.8)
    stage(0.0, "a")
    stage(0.5, "a")
    stage(1.0, "a")
    assert [round(fraction, 6) for fraction in seen] == [0.4, 0.6, 0.8]
    silent(0.5, "a")
