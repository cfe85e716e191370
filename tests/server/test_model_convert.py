from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from server.model_convert import _add_bos, _begins_with_bos
from tests.server.tiny_model import write_gguf


def tokenizer(bos: str | None) -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, unk_token="<unk>")


def test_texts_begin_with_the_token_that_the_model_expects(tmp_path: Path) -> None:
    made = tokenizer("<s>")
    assert made("a b")["input_ids"] == [2, 3]
    for _ in range(2):
        _add_bos(made)
        assert made("a b")["input_ids"] == [0, 2, 3]
    assert made("a b", add_special_tokens=False)["input_ids"] == [2, 3]
    assert made("a", "b")["input_ids"] == [0, 2, 0, 3]
    made.save_pretrained(tmp_path)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path)("b")["input_ids"] == [0, 3]


def test_without_such_a_token_there_is_nothing_to_add() -> None:
    made = tokenizer(None)
    _add_bos(made)
    assert made("a b")["input_ids"] == [2, 3]


@pytest.mark.parametrize("wanted", [True, False])
def test_what_a_file_says_of_it_is_read(tmp_path: Path, wanted: bool) -> None:
    writer = gguf.GGUFWriter(tmp_path / "said.gguf", "llama")
    writer.add_add_bos_token(wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert _begins_with_bos(tmp_path / "said.gguf") is wanted


def test_a_file_that_says_nothing_wants_none(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    assert not _begins_with_bos(tmp_path / "tiny.gguf")
