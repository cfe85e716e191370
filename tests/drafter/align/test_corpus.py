import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from drafter.align import corpus as corpus_module
from drafter.align.corpus import Answer, AnswerId, Corpus, ShardWriter, is_held_out, recorded_ids, shard_paths


def answer(index: int, length: int = 5, prompt_len: int = 2, layers: Sequence[int] = (1, 4)) -> Answer:
    """An answer whose tokens and hidden states tell which one it is."""
    hidden = {layer: torch.full((length, 3), 10.0 * index + layer, dtype=torch.float16) for layer in layers}
    return Answer(AnswerId("chat", index, 0.5), prompt_len, torch.arange(length) + 100 * index, hidden)


def write(folder: Path, *answers: Answer) -> None:
    writer = ShardWriter(folder)
    for item in answers:
        writer.add(item)
    writer.flush()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_ids_read_as_category_prompt_and_temperature() -> None:
    assert str(AnswerId("math", 12, 0.7)) == "math/12/0.7"
    assert str(AnswerId("math", 12, 0.0)) == "math/12/0"
    assert AnswerId.parse("math/12/0.7") == AnswerId("math", 12, 0.7)


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="/"), max_size=8),
    st.integers(0, 10**9),
    st.integers(0, 200).map(lambda hundredths: hundredths / 100),
    st.integers(0, 3),
)
def test_ids_survive_a_round_trip(category: str, index: int, temperature: float, turn: int) -> None:
    answer_id = AnswerId(category, index, temperature, turn)
    assert AnswerId.parse(str(answer_id)) == answer_id
    assert AnswerId.parse(f"{answer_id}-b81f09cc") == answer_id


def test_every_answer_has_its_own_seed() -> None:
    ids = [AnswerId("chat", i, t, turn) for i in range(200) for t in (0.7, 1.0) for turn in (0, 1)]
    assert len({answer.seed for answer in ids}) == len(ids)


def test_what_the_engine_appends_to_an_id_is_ignored() -> None:
    assert AnswerId.parse("self-made/3/0.7-b81f09cc") == AnswerId("self-made", 3, 0.7)
    assert AnswerId.parse("chat/3/0-0a1b") == AnswerId("chat", 3, 0.0)


@pytest.mark.parametrize("text", ["chat", "chat/3", "chat/x/0", "chat/3/warm", "chat/3/", "//", "a/b/c/d"])
def test_other_texts_are_no_ids(text: str) -> None:
    assert not AnswerId.is_one(text)
    with pytest.raises(ValueError, match="values|literal|convert|answer id"):
        AnswerId.parse(text)


@pytest.mark.parametrize(
    "text", ["chat/3/0", "chat/3/0.7", "chat/3/0.7-b81f09cc", "e-mail/3/0.7/1", "e-mail/3/0.7/1-b81f09cc"]
)
def test_ids_are_recognised(text: str) -> None:
    assert AnswerId.is_one(text)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    answers = [answer(0, 5, 2), answer(1, 3, 1), answer(2, 7, 6)]
    write(tmp_path, *answers)
    corpus = Corpus(tmp_path, (4, 1))
    assert len(corpus) == 3 and corpus.layers == (4, 1) and corpus.ids == [item.id for item in answers]
    for index in (2, 0, 1):
        expected, read = answers[index], corpus.read(index)
        assert (read.id, read.prompt_len) == (expected.id, expected.prompt_len)
        assert read.token_ids.dtype == torch.int64 and torch.equal(read.token_ids, expected.token_ids)
        assert list(read.hidden) == [4, 1]
        assert all(torch.equal(read.hidden[layer], expected.hidden[layer]) for layer in (1, 4))
        assert torch.equal(corpus.token_ids(index), expected.token_ids)
        assert corpus.answer_tokens(index) == len(expected.token_ids) - expected.prompt_len


def test_only_the_layers_asked_for_are_read(tmp_path: Path) -> None:
    write(tmp_path, answer(0))
    assert list(Corpus(tmp_path, (4,)).read(0).hidden) == [4]


def test_a_shard_has_the_documented_tensors(tmp_path: Path) -> None:
    write(tmp_path, answer(0, 5, 2), answer(1, 3, 1))
    tensors = load_file(tmp_path / "shard-00000.safetensors")
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} == {
        "token_ids": (torch.int32, [8]),
        "offsets": (torch.int64, [3]),
        "prompt_lens": (torch.int32, [2]),
        "hidden_1": (torch.float16, [8, 3]),
        "hidden_4": (torch.float16, [8, 3]),
    }
    assert tensors["offsets"].tolist() == [0, 5, 8] and tensors["prompt_lens"].tolist() == [2, 1]
    with safe_open(tmp_path / "shard-00000.safetensors", framework="pt") as shard:
        assert json.loads(shard.metadata()["ids"]) == ["chat/0/0.5", "chat/1/0.5"]


def test_hidden_states_beyond_float16_are_clamped(tmp_path: Path) -> None:
    hidden = torch.tensor([[1e6, -1e6, 65504.0], [float("inf"), -0.5, -65504.0], [2.0, 0.0, -float("inf")]])
    write(tmp_path, Answer(AnswerId("chat", 0, 0.0), 1, torch.arange(3), {1: hidden}))
    assert Corpus(tmp_path, (1,)).read(0).hidden[1].tolist() == [
        [65504.0, -65504.0, 65504.0],
        [65504.0, -0.5, -65504.0],
        [2.0, 0.0, -65504.0],
    ]


def test_a_shard_is_written_when_enough_tokens_wait(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "new", tokens_per_shard=10)
    counts = []
    for index in range(5):
        writer.add(answer(index, length=4))
        counts.append(len(names(tmp_path / "new")))
    assert counts == [0, 0, 1, 1, 1]
    writer.flush()
    writer.flush()
    assert names(tmp_path / "new") == ["shard-00000.safetensors", "shard-00001.safetensors"]
    corpus = Corpus(tmp_path / "new", (1,))
    assert [item.prompt_index for item in corpus.ids] == [0, 1, 2, 3, 4]
    assert corpus.read(4).token_ids.tolist() == [400, 401, 402, 403]
    assert corpus.read(3).hidden[1].tolist() == [[31.0] * 3] * 4


def test_a_writer_goes_on_behind_the_last_shard(tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path, answer(index))
    (tmp_path / "shard-00000.safetensors").unlink()
    write(tmp_path, answer(3))
    assert names(tmp_path) == [f"shard-0000{i}.safetensors" for i in (1, 2, 3)]
    assert recorded_ids(tmp_path) == {"chat/1/0.5", "chat/2/0.5", "chat/3/0.5"}


def test_an_interrupted_write_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(tensors: object, path: Path, metadata: object) -> None:
        del tensors, metadata
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "save_file", cut_off)
        writer = ShardWriter(tmp_path)
        writer.add(answer(0))
        with pytest.raises(KeyboardInterrupt):
            writer.flush()
    assert shard_paths(tmp_path) == [] and recorded_ids(tmp_path) == set()
    write(tmp_path, answer(1))
    assert names(tmp_path) == ["shard-00000.safetensors"]
    assert recorded_ids(tmp_path) == {"chat/1/0.5"}


def test_nothing_is_written_for_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    assert names(tmp_path) == []


def test_a_folder_without_shards_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} holds no corpus: no file matches shard-"):
        Corpus(tmp_path, (1,))


def test_a_layer_that_was_not_recorded_is_named_with_those_that_were(tmp_path: Path) -> None:
    write(tmp_path, answer(0))
    write(tmp_path, answer(1, layers=(1, 2)))
    with pytest.raises(ValueError, match=r"shard-00001.safetensors: .* layers \[4\] are not recorded; it has \[1, 2\]"):
        Corpus(tmp_path, (1, 4))


def test_one_prompt_in_forty_is_held_out() -> None:
    assert [index for index in range(121) if is_held_out(index)] == [0, 40, 80, 120]
