"""The alignment corpus on disk: the target's own answers with the hidden states it had while writing them.

A corpus is a folder of ``shard-*.safetensors``. Each shard holds whole answers, concatenated:

* ``token_ids`` ``[T]`` int32: prompt and answer of every entry, one after the other;
* ``offsets`` ``[n + 1]`` int64: where each entry starts and, last, ``T``;
* ``prompt_lens`` ``[n]`` int32: how many of an entry's tokens are prompt;
* ``hidden_<layer>`` ``[T, hidden]`` float16: one tensor per recorded hidden state;

and, in the metadata, the JSON list of entry ids. The last token of an answer is emitted but never run through
the target, so its hidden state does not exist: that row is zero and nothing may read it.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_FLOAT16_MAX = 65504.0
_HELD_OUT_EVERY = 40


@dataclass(frozen=True, slots=True)
class AnswerId:
    """Names one answer: what it is about, which prompt, how it was sampled, and which of its conversation it is."""

    category: str
    prompt_index: int
    temperature: float
    turn: int = 0

    def __str__(self) -> str:
        turn = f"/{self.turn}" if self.turn else ""
        return f"{self.category}/{self.prompt_index}/{self.temperature:g}{turn}"

    @property
    def seed(self) -> int:
        """Of the noise that the answer is sampled with: so it can be drafted anew as it was then."""
        return zlib.crc32(str(self).encode())

    @classmethod
    def parse(cls, text: str) -> "AnswerId":
        """Read an id back; a suffix that the engine appended after a ``-`` is ignored.

        Raises:
            ValueError: ``text`` is no answer id.
        """
        *parts, last = text.split("/")
        category, index, temperature, *turn = *parts, last.split("-")[0]
        return cls(category, int(index), float(temperature), *map(int, turn))

    @staticmethod
    def is_one(text: str) -> bool:
        """Whether ``text`` reads as an answer id."""
        try:
            AnswerId.parse(text)
        except (ValueError, TypeError):
            return False
        return True


def is_held_out(prompt_index: int) -> bool:
    """Whether answers to this prompt are kept from training to measure on."""
    return prompt_index % _HELD_OUT_EVERY == 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt and its answer.

    Attributes:
        id: where it came from.
        prompt_len: tokens of the prompt.
        token_ids: ``[n]`` int64, prompt and answer.
        hidden: per layer ``[n, hidden]`` float16; the last row is zero.
    """

    id: AnswerId
    prompt_len: int
    token_ids: torch.Tensor
    hidden: dict[int, torch.Tensor]


class ShardWriter:
    """Gathers answers and writes them as shards of at least ``tokens_per_shard`` tokens.

    A shard appears under its final name only when it is complete, so an interrupted run leaves no half file.
    """

    def __init__(self, folder: Path, tokens_per_shard: int = 32768):
        self._folder = folder
        self._tokens_per_shard = tokens_per_shard
        self._pending: list[Answer] = []
        self._pending_tokens = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._next_index = 1 + max((_shard_index(p) for p in shard_paths(folder)), default=-1)

    def add(self, answer: Answer) -> None:
        """Queue one answer and write a shard when enough tokens are waiting."""
        self._pending.append(answer)
        self._pending_tokens += len(answer.token_ids)
        if self._pending_tokens >= self._tokens_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting, if anything."""
        if not self._pending:
            return
        answers, self._pending, self._pending_tokens = self._pending, [], 0
        lengths = torch.tensor([0] + [len(a.token_ids) for a in answers])
        tensors = {
            "token_ids": torch.cat([a.token_ids for a in answers]).to(torch.int32),
            "offsets": lengths.cumsum(0),
            "prompt_lens": torch.tensor([a.prompt_len for a in answers], dtype=torch.int32),
        }
        for layer in answers[0].hidden:
            rows = torch.cat([a.hidden[layer] for a in answers])
            tensors[f"hidden_{layer}"] = rows.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).to(torch.float16)
        path = self._folder / f"shard-{self._next_index:05d}.safetensors"
        self._next_index += 1
        unfinished = path.with_suffix(".partial")
        save_file(tensors, unfinished, metadata={"ids": json.dumps([str(a.id) for a in answers])})
        os.replace(unfinished, path)


def shard_paths(folder: Path) -> list[Path]:
    """The complete shards of a corpus, in order."""
    return sorted(folder.glob("shard-*.safetensors"))


def recorded_ids(folder: Path) -> set[str]:
    """Ids of every answer that the corpus already holds; reads no tensors."""
    ids: set[str] = set()
    for path in shard_paths(folder):
        with safe_open(path, framework="pt") as shard:
            ids.update(json.loads(shard.metadata()["ids"]))
    return ids


class Corpus:
    """Random access to the answers of a corpus; tensors are read from disk when asked for.

    Args:
        folder: the corpus folder.
        layers: hidden states that ``read`` returns.

    Raises:
        ValueError: the folder holds no shard, or a shard lacks one of the layers.
    """

    def __init__(self, folder: Path, layers: Sequence[int]):
        self.layers = tuple(layers)
        self._rows: list[tuple[int, slice, int]] = []
        self._shards = []
        self.ids: list[AnswerId] = []
        paths = shard_paths(folder)
        if not paths:
            raise ValueError(f"{folder} holds no corpus: no file matches shard-*.safetensors")
        for index, path in enumerate(paths):
            shard = safe_open(path, framework="pt")
            present = {int(k.removeprefix("hidden_")) for k in shard.keys() if k.startswith("hidden_")}  # noqa: SIM118
            if missing := sorted(set(layers) - present):
                raise ValueError(
                    f"{path}: hidden states of layers {missing} are not recorded; it has {sorted(present)}"
                )
            offsets, prompt_lens = shard.get_tensor("offsets").tolist(), shard.get_tensor("prompt_lens").tolist()
            bounds = zip(offsets, offsets[1:], prompt_lens, strict=False)
            self._rows.extend((index, slice(start, end), prompt_len) for start, end, prompt_len in bounds)
            self.ids.extend(AnswerId.parse(text) for text in json.loads(shard.metadata()["ids"]))
            self._shards.append(shard)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Answer:
        """The answer at ``index``, with its hidden states."""
        shard_index, rows, prompt_len = self._rows[index]
        shard = self._shards[shard_index]
        hidden = {layer: shard.get_slice(f"hidden_{layer}")[rows] for layer in self.layers}
        return Answer(self.ids[index], prompt_len, self.token_ids(index), hidden)

    def token_ids(self, index: int) -> torch.Tensor:
        """``[n]`` int64, prompt and answer at ``index``."""
        shard_index, rows, _ = self._rows[index]
        token_ids: torch.Tensor = self._shards[shard_index].get_slice("token_ids")[rows]
        return token_ids.long()

    def answer_tokens(self, index: int) -> int:
        """Tokens of the answer at ``index``, without its prompt."""
        _, rows, prompt_len = self._rows[index]
        return int(rows.stop - rows.start - prompt_len)


def _shard_index(path: Path) -> int:
    return int(path.stem.removeprefix("shard-"))
