"""Keeping back what the engine's processes print."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from server.engine_output import EngineOutput


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_children_are_kept_back_and_the_first_exception_is_the_cause(capfd: pytest.CaptureFixture[str]) -> None:
    output = EngineOutput(show=False)
    with output.captured():
        subprocess.run(
            [
                "/bin/sh",
                "-c",
                "echo starting; echo '(Core) ERROR [x.py:3] my.OwnError: no room' >&2; echo RuntimeError: later",
            ],
            check=True,
        )
    os.write(2, b"ours\n")
    _until(lambda: "later" in output.text())
    assert output.cause() == "no room"
    assert capfd.readouterr().err == "ours\n"


def test_no_exception_no_cause() -> None:
    output = EngineOutput(show=False)
    with output.captured():
        os.write(1, b"all is well\n")
    _until(lambda: "well" in output.text())
    assert output.cause() is None


def test_after_the_start_lines_are_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    output = EngineOutput(show=False)
    with output.captured():
        child = subprocess.Popen(
            [sys.executable, "-uc", "print('early'); input(); print('late')"], stdin=subprocess.PIPE
        )
    _until(lambda: "early" in output.text())
    output.pass_on()
    child.communicate(b"\n")
    seen = ""

    def late() -> bool:
        nonlocal seen
        seen += capfd.readouterr().err
        return "late" in seen

    _until(late)
    assert "early" not in seen
