import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.interrupts import Interrupts
from bench.methods import Launch
from bench.process import EngineProcess, stop_processes
from bench.sessions import SessionGuard, session_members
from tests.bench.fakes import is_running, wait_until

# A leader that leaves when asked to, with a child in its group and one in a group of its own, both deaf to SIGTERM.
SCRIPT = """
count() { trap '' TERM; while :; do echo $1; sleep 0.005; done; }
count a & set -m; count b & set +m
trap 'exit 0' TERM
while :; do echo leader; sleep 0.005; done
"""


def start(tmp_path: Path, script: str = SCRIPT) -> EngineProcess:
    return EngineProcess(Launch(("/bin/bash", "-c", script), {"ADDED": "yes"}), tmp_path / "engine.log")


def printed(process: EngineProcess) -> set[str]:
    return set(process.log.read_text().split())


def start_deaf(tmp_path: Path) -> EngineProcess:
    """An engine that already ignores SIGTERM when this returns."""
    process = start(tmp_path, "trap '' TERM; echo deaf; while :; do sleep 0.01; done")
    wait_until(lambda: printed(process) == {"deaf"})
    return process


def test_freezing_stops_the_whole_session_and_resuming_wakes_it(tmp_path: Path) -> None:
    process = start(tmp_path)
    try:
        wait_until(lambda: printed(process) == {"a", "b", "leader"})
        assert process.freeze()
        assert process.frozen
        members = session_members(process.session)
        assert len({member.group for member in members}) > 1
        assert {member.state for member in members} == {"T"}
        process.log.write_text("")
        process.resume()
        assert not process.frozen
        wait_until(lambda: printed(process) >= {"a", "b", "leader"})
    finally:
        stop_processes([process])
    assert process.gone
    assert process.exit_code == 0  # the leader shut down in order; the deaf ones were killed


def test_frozen_and_stubborn_engines_are_stopped_too(tmp_path: Path) -> None:
    stubborn = start_deaf(tmp_path)
    stubborn.freeze()
    stop_processes([stubborn], grace=0.1)
    assert stubborn.exit_code == -signal.SIGKILL
    hurried = start_deaf(tmp_path)
    stop_processes([hurried], grace=60, hurry=lambda: True)
    assert hurried.gone


def test_logs_and_environment(tmp_path: Path) -> None:
    process = start(tmp_path, "echo $ADDED; for i in 1 2 3; do echo $i >&2; done; exit 5")
    wait_until(lambda: process.gone)
    assert process.exit_code == 5
    assert process.log_tail(lines=3) == ("1", "2", "3")
    assert process.log_tail() == ("yes", "1", "2", "3")


def test_the_guard_kills_what_a_killed_benchmark_left_frozen(tmp_path: Path) -> None:
    benchmark = f"""
import pathlib, time
from bench.methods import Launch
from bench.process import EngineProcess
from bench.sessions import SessionGuard
with SessionGuard() as guard:
    process = EngineProcess(Launch(("sleep", "600")), pathlib.Path({str(tmp_path / "log")!r}))
    guard.add(process.session)
    process.freeze()
    print(process.session, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", benchmark], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout
        engine = int(killed.stdout.readline())
        killed.kill()
    wait_until(lambda: not is_running(engine))


def test_the_guard_leaves_dropped_sessions_alone(tmp_path: Path) -> None:
    process = start(tmp_path, "exec sleep 600")
    try:
        with SessionGuard() as guard:
            guard.add(process.session)
            guard.drop(process.session)
        assert process.exit_code is None
    finally:
        stop_processes([process])


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("signum", SIGNALS)
def test_interrupts_wait_while_they_are_deferred(signum: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    steps: list[str] = []

    def interrupted_work(interrupts: Interrupts) -> None:
        with interrupts.deferred():
            os.kill(os.getpid(), signum)
            with interrupts.deferred():  # inside of another it changes nothing
                steps.append("inside")
            steps.append("pending" if interrupts.pending else "lost")
        steps.append("never")

    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            interrupted_work(interrupts)
        assert steps == ["inside", "pending"]
        assert interrupts.received == signum
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)
    assert [signal.getsignal(each) for each in SIGNALS] == before
