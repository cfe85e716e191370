"""A model of a few kilobytes in the same packing as the real one: a GGUF file inside a wheel."""

import zipfile
from pathlib import Path

import gguf
import numpy as np

from server.model_fetch import KnownModel
from server.model_manifest import sha256

HIDDEN, HEADS, LAYERS, FEED_FORWARD = 32, 2, 1, 64
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PACKAGE, MEMBER = "tiny-model-for-tests", "tiny_model_for_tests/tiny.gguf"


def known_tiny_model(folder: Path) -> KnownModel:
    """Write the wheel into ``folder`` and describe it."""
    file = folder / "tiny.gguf"
    write_gguf(file)
    wheel = folder / "tiny_model_for_tests-1.0-py3-none-any.whl"
    info = "tiny_model_for_tests-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, MEMBER)
        # A dependency that exists nowhere: taking the model must not install it.
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\nRequires-Dist: exists-nowhere\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return KnownModel(
        name="tiny",
        requirement=f"{PACKAGE}==1.0",
        member=MEMBER,
        sha256=sha256(file),
        wheel_bytes=wheel.stat().st_size,
        disk_bytes=1_000_000,
        licence="Apache-2.0",
    )


def embedding() -> np.ndarray:
    """The token embedding that is written, ``[vocabulary, hidden]``."""
    return np.random.default_rng(0).normal(size=(len(_tokens()), HIDDEN)).astype(np.float32)


def write_gguf(path: Path) -> None:
    """Write a Llama of one layer with a byte-level tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(_tokens()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(_tokens())
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(_tokens()) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(_tokens()) - 1)
    writer.add_eos_token_id(len(_tokens()) - 1)
    writer.add_chat_template(TEMPLATE)
    for name, shape in _tensor_shapes().items():
        writer.add_tensor(name, np.full(shape, 0.5, dtype=np.float32))
    writer.add_tensor("token_embd.weight", embedding())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokens() -> list[str]:
    return [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["ab", "<|end|>"]


def _tensor_shapes() -> dict[str, tuple[int, ...]]:
    square = (HIDDEN, HIDDEN)
    return {
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        **{f"blk.0.attn_{part}.weight": square for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
    }
