"""Servers that are not ours: what their flags mean, and how they are measured beside our engines."""

import json
import shlex
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench import cli
from bench.engines import EnginePool
from bench.errors import BenchError, EngineError
from bench.interrupts import Interrupts
from bench.methods import EngineSettings, Launch, Method
from bench.process import free_port
from bench.report import Report, read_report
from bench.servers import server_methods, without_folders
from tests.bench.fake_server import FakeBehaviour
from tests.bench.fakes import (
    engine_pids,
    fake_method,
    is_running,
    parse,
    script_method,
    wait_until,
    write_model,
    write_prompts,
)

SHARED = EngineSettings(Path("/models/target"))


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://127.0.0.1:8081", "http://127.0.0.1:8081"),
        (" HTTP://localhost:8081/v1/ ", "http://localhost:8081"),
        ("http://[::1]:8081/proxy/v1", "http://[::1]:8081/proxy"),
        ("http://other", "http://other"),
    ],
)
def test_an_address_is_a_server_that_runs_already(given: str, address: str) -> None:
    (method,) = server_methods([f"llama.cpp={given}"], ())
    assert method.launch(SHARED, 1) == Launch((), address=address)
    assert (method.name, method.external, method.plain) == ("llama.cpp", address, False)
    assert method.title == f"llama.cpp ({address})"


def test_a_command_line_starts_a_server_on_the_port_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    (method,) = server_methods(
        ["a b=/opt/x/serve -m '~/my models/m.gguf' --log=/a/b --json '{\"p\": {port}}' --port {port} org/model"], ()
    )
    launch = method.launch(SHARED, 8123)
    assert launch.address is None
    assert launch.command == (
        *("/opt/x/serve", "-m", "/home/somebody/my models/m.gguf", "--log=/a/b"),
        *("--json", '{"p": 8123}', "--port", "8123", "org/model"),
    )
    assert method.external == "serve -m m.gguf --log=b --json '{\"p\": {port}}' --port {port} org/model"
    assert method.name == "a b"


def test_only_folders_of_absolute_paths_are_dropped() -> None:
    words = ("/a/b c/d", "~/x", "./build/bin/s", "--model=/a/b.gguf", "http://h/p", "a=b/c", "--list=/a,/b")
    assert without_folders(words) == ("d", "x", "./build/bin/s", "--model=b.gguf", "http://h/p", "a=b/c", "--list=b")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["=http://127.0.0.1:1"], "a name is needed in front of the equals sign"),
        (["a\nb=http://127.0.0.1:1"], "a name is needed in front of the equals sign"),
        (["ar=http://127.0.0.1:1"], 'the name "ar" is taken already'),
        (["x=http://127.0.0.1:1", "x=http://127.0.0.1:2"], 'the name "x" is taken already'),
        (["x"], "expected the address of a running server"),
        (["x=127.0.0.1:8081"], 'got "127.0.0.1:8081"'),
        (["x=llama-server --port 8081"], 'with "{port}" where the server is told its port'),
        (["x=llama-server '--port {port}"], "the command line cannot be split into words: No closing quotation"),
        (["x=https://127.0.0.1:1"], 'expected http://HOST:PORT and nothing but a path behind it, got "https://'),
        (["x=http://:8081"], "expected http://HOST:PORT"),
        (["x=http://me:secret@host:1"], "expected http://HOST:PORT"),
        (["x=http://host:1?key=secret"], "expected http://HOST:PORT"),
        (["x=http://host:1#part"], "expected http://HOST:PORT"),
        (["x=http://host:port"], '"http://host:port" is not an address: '),
    ],
)
def test_mistakes(texts: Sequence[str], message: str) -> None:
    with pytest.raises(BenchError) as error:
        server_methods(texts, {"ar"})
    assert str(error.value).startswith(f'--server "{texts[-1]}": ')
    assert message in str(error.value)


def listens(port: int) -> bool:
    """Somebody answers there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(folder: Path, **behaviour: Any) -> Iterator[str]:
    """A fake server that somebody else started, and that is still there at the end; its address."""
    folder.mkdir()
    port = free_port()
    with subprocess.Popen(FakeBehaviour(str(folder), "other", **behaviour).command(port)) as process:
        try:
            wait_until(lambda: listens(port))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def bench(folder: Path, methods: Sequence[Method], *arguments: str) -> tuple[int, Report]:
    common = ["--prompts", str(write_prompts(folder)), "--model", str(write_model(folder)), "--methods"]
    common += [",".join(method.name for method in methods), "--output", str(folder / "report.json")]
    common += ["--max-tokens", "9", "--repeats", "2", "--concurrency", "1", *arguments]
    code = cli.run(parse(common), {"slipstream": fake_method(folder, "slipstream"), **{m.name: m for m in methods}})
    assert not any(is_running(pid) for pid in engine_pids(folder))
    return code, read_report(folder / "report.json")


def test_a_running_server_is_measured_beside_our_engines_and_goes_on_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    with running(theirs, tokens_per_step=3) as address:
        given = f"llama.cpp={address}/v1"
        monkeypatch.setattr("sys.argv", ["slipstream", "bench", "--server", given])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        ar = fake_method(tmp_path, "ar", step_seconds=0.006)
        code, report = bench(tmp_path, [ar], "--server", given)
        assert code == 0
        wait_until(lambda: all(is_running(pid) for pid in engine_pids(theirs)))
    assert report.complete and not report.failures
    rows = {row.method: row for row in report.rows if row.category == "all"}
    assert list(rows) == ["ar", "llama.cpp"]
    other = rows["llama.cpp"]
    assert (other.repeats, other.requests, other.output_tokens) == (2, 10, 90)
    assert (other.weight_format, rows["ar"].weight_format) == (None, "float32")
    assert other.speed_vs_ar is not None and other.speed_vs_ar > 1.5
    assert other.identical_to_ar is True
    assert other.emitted_per_verify_step is None
    entry = report.methods[1]
    assert (entry.name, entry.external, entry.command, entry.startup_seconds) == ("llama.cpp", address, (), None)
    assert not entry.environment
    assert report.command == ("slipstream", "bench", "--server", f"llama.cpp={address}")
    # Nothing of ours runs while it answers.
    ticks = [float(line) for line in (tmp_path / "ar.ticks").read_text().split()]
    answered = [tuple(map(float, line.split())) for line in (theirs / "other.answered").read_text().splitlines()]
    assert ticks and len(answered) > 10
    assert not [tick for tick in ticks for began, ended in answered if began < tick < ended]
    captured = capsys.readouterr()
    assert f"llama.cpp ({address}): looking for it (2 of 2)\nllama.cpp: ready\n" in captured.err
    assert f"\nllama.cpp: {address}\n" in captured.out


def test_a_server_given_by_its_command_line_is_one_of_our_processes(tmp_path: Path) -> None:
    behaviour = FakeBehaviour(str(tmp_path), "other", tokens_per_step=3, differs_on="two")
    python, program, _, settings = behaviour.command(0)
    command = shlex.join((python, program, "{port}", settings))
    code, report = bench(tmp_path, [fake_method(tmp_path, "ar")], "--server", f"x={command}", "--logs", str(tmp_path))
    assert code == 0
    entry = report.methods[1]
    assert entry.command[:2] == (Path(python).name, Path(program).name)
    assert (entry.startup_seconds or 0) > 0
    assert entry.external == shlex.join((Path(python).name, Path(program).name, "{port}", settings)).replace(
        "'{port}'", "{port}"
    )
    assert report.rows[-1].identical_fraction == 0.8
    assert {path.name for path in tmp_path.glob("*.log")} == {"ar.log", "x.log"}
    ticks = [float(line) for line in (tmp_path / "other.ticks").read_text().split()]
    answered = [list(map(float, line.split())) for line in (tmp_path / "ar.answered").read_text().splitlines()]
    assert len(answered) > 10
    assert not [tick for tick in ticks for began, ended in answered if began < tick < ended]


def test_a_server_that_is_not_there_is_named_at_once_and_the_others_go_on(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    code, report = bench(tmp_path, [fake_method(tmp_path, "ar")], "--server", f"x={address}", "--limit", "1")
    assert code == 1
    (failure,) = report.failures
    assert (failure.method, failure.stage) == ("x", "start")
    assert failure.message.startswith(f"no server to be measured at {address}: ConnectError: ")
    assert {row.method for row in report.rows} == {"ar"}


def test_a_running_server_that_gives_up_is_reported(tmp_path: Path) -> None:
    with running(tmp_path / "theirs", ends_after=6) as address:
        code, report = bench(tmp_path, [fake_method(tmp_path, "ar")], "--server", f"x={address}")
    assert code == 1 and report.complete
    assert {(failure.method, failure.stage) for failure in report.failures} >= {("x", "measure")}
    assert report.failures[-1].message.startswith("all ")
    assert report.failures[-1].log_tail == ()


def test_servers_may_stand_alone_but_not_take_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path / "theirs") as address:
        code, report = bench(tmp_path, [], "--server", f"x={address}", "--limit", "1")
        assert (code, [entry.name for entry in report.methods]) == (0, ["x"])
    arguments = ["--prompts", "p.jsonl", "--variant", "x:engine.seed=1", "--server", f"x={address}"]
    assert cli.run(parse(arguments)) == 2
    assert capsys.readouterr().err.endswith('the name "x" is taken already\n')


class Odd(BaseHTTPRequestHandler):
    """A server that is loading for two questions, and whose list of models is ``models``."""

    asked = 0
    models: object = {"data": [{"id": "m"}]}

    def do_GET(self) -> None:
        """Answer ``/health`` and ``/v1/models``."""
        kind = type(self)
        kind.asked += 1
        self.send_response(503 if self.path == "/health" and kind.asked <= 2 else 200)
        self.end_headers()
        self.wfile.write(json.dumps(kind.models).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def find(folder: Path, models: object, startup_timeout: float = 10.0) -> tuple[str, int]:
    """The model that a running server of this kind is asked for, and how many questions that took."""

    class Server(Odd):
        pass

    Server.models = models
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            method = script_method("x", "")
            address = f"http://127.0.0.1:{server.server_port}"
            with Interrupts() as interrupts, EnginePool(interrupts, folder, lambda _: None, startup_timeout) as pool:
                engine = pool.start(method, Launch((), address=address), 1)
                pool.focus(engine)
                pool.retire(engine.process)
            return engine.target.model, Server.asked
        finally:
            server.shutdown()


def test_a_running_server_is_waited_for_while_it_loads(tmp_path: Path) -> None:
    assert find(tmp_path, {"data": [{"id": "m"}, {"id": "n"}]}) == ("m", 4)
    with pytest.raises(EngineError, match=r"^the engine was not ready after 0\.05 s$"):
        find(tmp_path, {"data": [{"id": "m"}]}, startup_timeout=0.05)


@pytest.mark.parametrize("models", [{"data": []}, [], {"data": [{}]}])
def test_a_server_of_another_kind_is_not_measured(tmp_path: Path, models: object) -> None:
    with pytest.raises(EngineError, match="/v1/models does not answer with a list of models"):
        find(tmp_path, models)
