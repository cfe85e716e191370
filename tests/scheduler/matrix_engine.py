"""A real engine that answers the exactness matrix's questions."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.engine_server import EngineServer
from tests.scheduler.matrix_cells import TEMPERATURE, EngineSetup, Load
from tests.scheduler.matrix_questions import Question
from tests.scheduler.matrix_state import Counters, Finished

_REPOSITORY = Path(__file__).parents[2]
_SOURCES = ("server", "scheduler", "drafter", "cuda_ext", "configs")
_SUFFIXES = {".py", ".cpp", ".h", ".yaml", ".txt"}

# Far above what any answer takes: the machine may stand still for minutes, as one that is suspended does.
_REQUEST_SECONDS = 3600.0


@contextmanager
def serving(setup: EngineSetup, logs: Path, asked: Sequence[Question]) -> Iterator[Callable[[Load], Finished]]:
    """An engine for as long as the context lasts, as the function that answers its loads.

    Args:
        setup: of the engine.
        logs: folder for what it prints.
        asked: all questions of the matrix.

    Raises:
        RuntimeError: it does not start.
        TimeoutError: it is not ready in time.
    """
    code = _code_digest()
    server = EngineServer(logs / f"{setup.name.replace(' ', '-')}.log", setup.flags)
    try:
        server.wait()
        server.client.timeout = _REQUEST_SECONDS
        server.client.headers["Connection"] = "close"  # a machine that stood still finds kept connections gone
        yield lambda load: _answer(server, load, asked[load.first : load.end], code)
    finally:
        server.stop()


def _answer(server: EngineServer, load: Load, asked: Sequence[Question], code: str) -> Finished:
    before, start = _engine_counters(server), time.monotonic()
    pool = ThreadPoolExecutor(load.cell.concurrency)
    try:
        seeded = map(load.cell.is_seeded, range(load.first, load.end))
        answers, lengths = zip(*pool.map(lambda *which: _ask(server, *which), asked, seeded), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
    long = Counters(prompts_longer_than_a_step=sum(length > load.cell.engine.chunk for length in lengths))
    seconds = round(time.monotonic() - start, 3)
    return Finished(answers, seconds, code, _engine_counters(server) - before + long)


def _ask(server: EngineServer, question: Question, seeded: bool) -> tuple[tuple[int, ...], int]:
    """Token ids of the answer and tokens of the prompt."""
    sampling = {"temperature": TEMPERATURE, "seed": question.seed} if seeded else {"temperature": 0}
    body = {"prompt": question.prompt, "max_tokens": question.max_tokens, "return_token_ids": True, **sampling}
    response = server.post("/v1/completions", body)
    response.raise_for_status()
    answer = response.json()
    return tuple(answer["choices"][0]["token_ids"]), answer["usage"]["prompt_tokens"]


def _engine_counters(server: EngineServer) -> Counters:
    drafts = server.speculation()["since_start"]
    return Counters(
        verified_draft_tokens=drafts["verified_tokens"],
        accepted_draft_tokens=drafts["accepted_tokens"],
        preemptions=int(server.metric("vllm:num_preemptions_total")),
        prefix_cache_hits=int(server.metric("vllm:prefix_cache_hits_total")),
    )


def _code_digest() -> str:
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((_REPOSITORY / folder).rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                digest.update(str(path.relative_to(_REPOSITORY)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
