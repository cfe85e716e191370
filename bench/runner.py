"""Running a benchmark: start the engines, measure them in alternation, keep the report on disk up to date."""

import os
import re
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from bench import loopback
from bench.client import Load, LoadResult, run_load
from bench.engines import Engine, EnginePool
from bench.errors import EngineError, Stage
from bench.interrupts import Interrupts
from bench.machine import describe_machine
from bench.measures import CellResult, build_rows
from bench.methods import EngineSettings, Launch, Method
from bench.plan import Cell, measuring_order, seconds_left
from bench.process import free_port
from bench.prompts import PromptFile
from bench.report import Failure, MethodEntry, PrefixCache, Report, Settings, write_report
from bench.servers import without_folders
from bench.speculation import SpeculationCounters, read_counters
from bench.terminal import Display

__all__ = ["BenchOptions", "Outcome", "run_benchmark"]

_WARM_UP_TOKENS = 32
_WAKE_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure and how; most of it is explained at ``bench.report.Settings``.

    Attributes:
        output: file of the report; its folder exists.
        command: the command line to note in the report.
        startup_timeout: seconds that an engine gets to become ready.
        request_timeout: seconds without a byte after which a request has failed.
        logs: folder for the engines' logs; ``None`` keeps them only as long as the benchmark runs.
    """

    methods: tuple[Method, ...]
    prompts: PromptFile
    engine: EngineSettings
    concurrencies: tuple[int, ...]
    max_tokens: int
    temperature: float
    repeats: int
    seed: int
    prefix_cache: PrefixCache
    output: Path
    command: tuple[str, ...]
    startup_timeout: float = 600.0
    request_timeout: float = 300.0
    logs: Path | None = None
    shortest: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The final report, as it is on disk, and the signal that ended the benchmark early, if one did."""

    report: Report
    interrupted_by: signal.Signals | None = None


def run_benchmark(options: BenchOptions, display: Display) -> Outcome:
    """Measure everything that ``options`` ask for.

    Engines that fail are reported and left out; an interrupt ends the benchmark with what was measured until then.
    No process is left behind in any case.

    Raises:
        BenchError: the report cannot be written.
    """
    return _Benchmark(options, display).run()


class _Benchmark:
    def __init__(self, options: BenchOptions, display: Display) -> None:
        self._options = options
        self._display = display
        self._created = datetime.now(UTC).isoformat(timespec="seconds")
        self._machine = describe_machine()
        self._engines: dict[str, Engine] = {}
        self._entries: dict[str, MethodEntry] = {}
        self._failures: list[Failure] = []
        self._results: list[CellResult] = []
        self._durations: list[tuple[Cell, float]] = []

    def run(self) -> Outcome:
        complete = False
        with Interrupts() as interrupts:
            try:
                with ExitStack() as stack:
                    logs = self._options.logs or Path(
                        stack.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-bench-"))
                    )
                    pool = EnginePool(interrupts, logs, self._display.status, self._options.startup_timeout)
                    stack.enter_context(pool)
                    self._start_engines(pool)
                    self._measure_all(pool)
                    complete = True
            except KeyboardInterrupt:
                interrupted_by: signal.Signals | None = interrupts.received
            else:
                interrupted_by = None
            report = self._report(complete)
            write_report(report, self._options.output)
        return Outcome(report, interrupted_by)

    def _start_engines(self, pool: EnginePool) -> None:
        for number, method in enumerate(self._options.methods, start=1):
            try:
                engine = self._start(pool, method, f"({number} of {len(self._options.methods)})")
            except EngineError as failure:
                self._fail(method.name, failure)
                continue
            self._engines[method.name] = engine
            took = "" if engine.startup_seconds is None else f" after {engine.startup_seconds:.1f} s"
            self._display.note(f"{method.name}: ready{took}")

    def _start(self, pool: EnginePool, method: Method, place: str) -> Engine:
        port = free_port()
        launch = method.launch(self._options.engine, port)
        self._display.note(f"{method.title}: {'starting' if launch.address is None else 'looking for it'} {place}")
        self._entries[method.name] = _entry(method, launch)
        engine = pool.start(method, launch, port)
        if engine.startup_seconds is not None:
            self._entries[method.name] = replace(
                self._entries[method.name], startup_seconds=round(engine.startup_seconds, 3)
            )
        try:
            self._warm_up(engine)
        except EngineError:
            pool.retire(engine.process)
            raise
        return engine

    def _warm_up(self, engine: Engine) -> None:
        """Let the engine see every concurrency before it counts: first steps allocate, and learn what steps cost."""
        prompts = [prompt for prompts in self._options.prompts.categories.values() for prompt in prompts]
        for concurrency in self._options.concurrencies:
            self._display.status(f"{engine.method.name}: warming up at concurrency {concurrency}")
            some = tuple(prompts[index % len(prompts)] for index in range(concurrency))
            load = self._load(some, concurrency, f"warm-up {concurrency}")
            _raise_if_all_failed("warm-up", engine, run_load(engine.target, _limited(load, _WARM_UP_TOKENS)))

    def _measure_all(self, pool: EnginePool) -> None:
        options = self._options
        names = [method.name for method in options.methods]
        remaining = list(
            measuring_order(
                options.repeats, options.concurrencies, tuple(options.prompts.categories), names, options.seed
            )
        )
        total = len(remaining)
        while remaining:
            cell = remaining.pop(0)
            engine = self._engines.get(cell.method)
            if engine is None:
                continue  # it failed before; its cells only take part in the count
            self._display.status(f"{cell.method}: {cell.category} at concurrency {cell.concurrency}")
            try:
                self._measure(pool, engine, cell)
            except EngineError as failure:
                self._fail(cell.method, failure)
                del self._engines[cell.method]
                pool.retire(engine.process)
            report = self._report(complete=False)
            write_report(report, options.output)
            left = seconds_left(self._durations, [later for later in remaining if later.method in self._engines])
            self._display.measured(cell, total - len(remaining), total, left, report.rows)

    def _measure(self, pool: EnginePool, engine: Engine, cell: Cell) -> None:
        began = time.monotonic()
        pool.focus(engine)
        self._wake_up(engine)
        prompts = self._options.prompts.categories[cell.category]
        load = self._load(prompts, cell.concurrency, f"repeat {cell.repeat} at {cell.concurrency}")
        with loopback.client(engine.target.base_url, timeout=10.0) as client:
            before = None if engine.method.plain else read_counters(client)
            measured = run_load(engine.target, load)
            after = None if before is None else read_counters(client)
        _raise_if_all_failed("measure", engine, measured)
        errors = [answer.error for answer in measured.answers if answer.error is not None]
        if errors:
            if failure := engine.failure_if_dead("measure"):
                raise failure
            where = f"{cell.category} at concurrency {cell.concurrency}, repeat {cell.repeat + 1}"
            message = f"{len(errors)} of {len(measured.answers)} requests failed in {where}; the first: {errors[0]}"
            self._failures.append(Failure(cell.method, "request", message))
            self._display.note(f"{cell.method}: {message}")
        counters: SpeculationCounters | None = after.since(before) if after and before else None
        self._results.append(CellResult(cell, measured.answers, measured.wall_seconds, counters))
        self._durations.append((cell, time.monotonic() - began))

    def _wake_up(self, engine: Engine) -> None:
        """One short request that is not measured: a process that was frozen comes back with cold caches."""
        load = self._load(("Hello",), 1, "wake-up")
        _raise_if_all_failed("measure", engine, run_load(engine.target, _limited(load, _WAKE_UP_TOKENS)))

    def _load(self, prompts: tuple[str, ...], concurrency: int, salt: str) -> Load:
        options = self._options
        return Load(
            prompts=prompts,
            concurrency=concurrency,
            max_tokens=options.max_tokens,
            shortest=options.shortest,
            temperature=options.temperature,
            seed=options.seed,
            cache_salt=salt if options.prefix_cache == "cold" else None,
            timeout=options.request_timeout,
        )

    def _fail(self, method: str, failure: EngineError) -> None:
        self._failures.append(Failure(method, failure.stage, str(failure), failure.log_tail))
        self._display.note(f"{method}: failed, the others go on: {failure}")

    def _report(self, complete: bool) -> Report:
        options = self._options
        engine = options.engine
        return Report(
            complete=complete,
            created=self._created,
            command=tuple(map(_portable, options.command)),
            machine=self._machine,
            settings=Settings(
                model=_portable(str(engine.model)),
                dtype=engine.dtype,
                max_model_len=engine.max_model_len,
                max_num_seqs=engine.max_num_seqs,
                max_num_batched_tokens=engine.max_num_batched_tokens,
                block_size=engine.block_size,
                kv_cache_gib=engine.kv_cache_gib,
                vllm_args=engine.vllm_args,
                engine_args=engine.engine_args,
                prompts=options.prompts.name,
                prompts_sha256=options.prompts.sha256,
                prompts_per_category={name: len(some) for name, some in options.prompts.categories.items()},
                concurrencies=options.concurrencies,
                max_tokens=options.max_tokens,
                temperature=options.temperature,
                repeats=options.repeats,
                seed=options.seed,
                prefix_cache=options.prefix_cache,
                shortest=options.shortest,
            ),
            methods=tuple(self._entries.values()),
            rows=build_rows(
                self._results,
                options.methods,
                tuple(options.prompts.categories),
                engine.dtype,
                greedy=options.temperature == 0,
            ),
            failures=tuple(self._failures),
        )


def _limited(load: Load, most: int) -> Load:
    """The load with answers of at most so many tokens, all alike."""
    return replace(load, max_tokens=min(most, load.max_tokens), shortest=None)


def _raise_if_all_failed(stage: Stage, engine: Engine, result: LoadResult) -> None:
    """An engine that answers nothing is not asked again, else every cell would wait for its time-outs."""
    errors = [answer.error for answer in result.answers if answer.error is not None]
    if len(errors) < len(result.answers):
        return
    if failure := engine.failure_if_dead(stage):
        raise failure
    message = f"all {len(errors)} requests failed; the first: {errors[0]}"
    raise EngineError(stage, message, engine.log_tail())


def _entry(method: Method, launch: Launch) -> MethodEntry:
    # The variables of this process say nothing about a server that ran before.
    inherited = os.environ if launch.address is None else {}
    environment = {**{name: value for name, value in inherited.items() if _matters(name)}, **launch.environment}
    command = without_folders(launch.command) if method.external else launch.command
    return MethodEntry(
        name=method.name,
        summary=_portable(method.summary),
        command=tuple("python" if part == sys.executable else _portable(part) for part in command),
        environment={name: _portable(value) for name, value in sorted(environment.items())},
        startup_seconds=None,
        settings={key: _portable(value) for key, value in method.settings.items()},
        external=method.external,
    )


_ENGINE_VARIABLES = ("VLLM_", "SLIPSTREAM_", "OMP_", "KMP_", "GOMP_", "MKL_", "TORCH_", "LD_PRELOAD", "CUDA_VISIBLE")
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def _matters(variable: str) -> bool:
    return variable.startswith(_ENGINE_VARIABLES) and not any(word in variable for word in _SECRETS)


def _portable(text: str) -> str:
    """Shorten paths that say more about whose machine it was than about what was measured; reports are published."""
    for folder, short in ((sys.prefix, "$VENV"), (str(Path.cwd()), "."), (str(Path.home()), "~")):
        if len(folder) > 1:
            text = re.sub(rf"{re.escape(folder)}(?=[/:]|$)", short, text)
    return text
