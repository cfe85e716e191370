from pathlib import Path

import pytest
import torch

from drafter.align.corpus import Answer, Corpus, recorded_ids
from drafter.align.recorder import FeatureRecorder
from drafter.types import PagedCacheSpec
from tests.drafter.simulated_engine import SimulatedEngine, Work
from tests.drafter.tiny import HIDDEN, LAYERS, random_target

ID, OTHER = "chat/3/0.5", "math/8/0"
PROMPT = [5, 17, 30, 2, 9]


def start(folder: Path, layers: tuple[int, ...] = (1, 3)) -> SimulatedEngine:
    return SimulatedEngine(FeatureRecorder(folder, layers))


def recorded(engine: SimulatedEngine, folder: Path, count: int = 1, loops: int = 0) -> list[Answer]:
    assert engine.proposer.command("flush", {}) == {"answers": count, "loops": loops}
    corpus = Corpus(folder, engine.proposer.hidden_state_layers)
    return [corpus.read(index) for index in range(len(corpus))]


def check(answer: Answer, engine: SimulatedEngine, prompt_len: int, token_ids: list[int]) -> None:
    assert answer.prompt_len == prompt_len
    assert answer.token_ids.tolist() == token_ids
    states = engine.hidden_states(token_ids[:-1])
    for layer in engine.proposer.hidden_state_layers:
        assert torch.equal(answer.hidden[layer][:-1], states[layer].half())
        assert torch.equal(answer.hidden[layer][-1], torch.zeros(HIDDEN, dtype=torch.float16))


def test_an_answer_is_its_prompt_its_tokens_and_their_hidden_states(tmp_path: Path) -> None:
    engine = start(tmp_path)
    engine.add(ID, PROMPT)
    engine.step({ID: Work(emitted=[7])})
    for token in (8, 9):
        engine.step({ID: Work(emitted=[token])})
    (answer,) = recorded(engine, tmp_path)
    assert str(answer.id) == ID
    check(answer, engine, 5, [*PROMPT, 7, 8, 9])


@pytest.mark.parametrize("chunks", [[2, 2], [1, 1, 1, 1], [4]])
def test_a_prompt_may_come_in_chunks(tmp_path: Path, chunks: list[int]) -> None:
    engine = start(tmp_path)
    engine.add(ID, PROMPT)
    for chunk in chunks:
        engine.step({ID: Work(run=chunk)})
    engine.step({ID: Work(emitted=[7])})
    engine.step({ID: Work(emitted=[8])})
    (answer,) = recorded(engine, tmp_path)
    check(answer, engine, 5, [*PROMPT, 7, 8])


def test_an_answer_loses_the_loop_that_it_ends_in(tmp_path: Path) -> None:
    engine = start(tmp_path)
    engine.add(ID, PROMPT)
    for token in (7, 1, 2, 3, *(4, 5, 6) * 11):
        engine.step({ID: Work(emitted=[token])})
    (answer,) = recorded(engine, tmp_path, loops=1)
    check(answer, engine, 5, [*PROMPT, 7, 1, 2, 3, 4, 5, 6])


def test_an_answer_of_one_token(tmp_path: Path) -> None:
    engine = start(tmp_path)
    engine.add(ID, PROMPT)
    engine.step({ID: Work(emitted=[7])})
    (answer,) = recorded(engine, tmp_path)
    check(answer, engine, 5, [*PROMPT, 7])


def test_requests_are_kept_apart_and_written_when_they_end(tmp_path: Path) -> None:
    engine = start(tmp_path)
    engine.add(ID, PROMPT)
    engine.step({ID: Work(emitted=[7])})
    engine.add(OTHER, PROMPT[::-1])
    engine.step({OTHER: Work(run=2), ID: Work(emitted=[8])})
    engine.end(ID)
    engine.step({OTHER: Work(emitted=[9])})
    engine.step({OTHER: Work(emitted=[10])})
    first, second = recorded(engine, tmp_path, count=2)
    assert (str(first.id), str(second.id)) == (ID, OTHER)
    check(first, engine, 5, [*PROMPT, 7, 8])
    check(second, engine, 5, [*PROMPT[::-1], 9, 10])


def test_a_recomputed_request_starts_afresh(tmp_path: Path) -> None:
    engine = start(tmp_path)
    engine.add(ID, PROMPT)
    engine.step({ID: Work(emitted=[7])})
    engine.step({ID: Work(emitted=[8])})
    state = engine.requests[ID]
    engine.end(ID, finished=False)
    engine.add(OTHER, PROMPT[:2])
    engine.step({OTHER: Work(emitted=[1])})
    engine.add(ID, state.tokens)
    engine.requests[ID].prompt_len = 5
    engine.step({ID: Work(run=4), OTHER: Work(emitted=[2])})
    engine.step({ID: Work(emitted=[9])})
    first, second = recorded(engine, tmp_path, count=2)
    check(first, engine, 5, [*PROMPT, 7, 8, 9])
    check(second, engine, 2, [*PROMPT[:2], 1, 2])


def test_a_prompt_without_an_answer_is_not_written(tmp_path: Path) -> None:
    engine = start(tmp_path)
    engine.add(ID, PROMPT)
    engine.step({ID: Work(run=3)})
    assert engine.proposer.command("flush", {}) == {"answers": 0, "loops": 0}
    assert recorded_ids(tmp_path) == set()


@pytest.mark.parametrize("request_id", ["cmpl-17", "turn-3", "a/b", "some/user/path"])
def test_other_requests_pass_by(tmp_path: Path, request_id: str) -> None:
    engine = start(tmp_path)
    engine.add(request_id, PROMPT)
    engine.add(ID, PROMPT)
    assert engine.step({request_id: Work(emitted=[7]), ID: Work(emitted=[8])}) == {request_id: ([], []), ID: ([], [])}
    engine.end(request_id)
    engine.step({ID: Work(emitted=[9])})
    (answer,) = recorded(engine, tmp_path)
    check(answer, engine, 5, [*PROMPT, 8, 9])


def test_a_flush_writes_each_answer_once(tmp_path: Path) -> None:
    engine = start(tmp_path)
    engine.add(ID, PROMPT)
    engine.step({ID: Work(emitted=[7])})
    assert engine.proposer.command("flush", {}) == {"answers": 1, "loops": 0}
    assert engine.proposer.command("flush", {}) == {"answers": 1, "loops": 0}
    assert recorded_ids(tmp_path) == {ID}


def test_an_unknown_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown command 'counters': the recorder knows 'flush'"):
        start(tmp_path).proposer.command("counters", {})


def test_the_recorder_needs_no_pages(tmp_path: Path) -> None:
    recorder = FeatureRecorder(tmp_path, (0, LAYERS))
    recorder.attach(random_target(), PagedCacheSpec(4, 4))
    assert recorder.page_tensors() == [] and recorder.cache_bytes_per_token() == 0
    assert recorder.hidden_state_layers == (0, LAYERS)


@pytest.mark.parametrize("layer", [-1, LAYERS + 1])
def test_a_layer_that_the_target_lacks_is_named(tmp_path: Path, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layers \[{layer}\] do not exist in models/tiny: 0 to {LAYERS} do"):
        FeatureRecorder(tmp_path, (0, layer)).attach(random_target(), PagedCacheSpec(4, 4))
