"""Turning a GGUF file into a folder with safetensors and a tokenizer, in a process of its own.

A separate process keeps torch, its threads and several hundred megabytes of freed memory out of the server, and turns
whatever goes wrong into one line.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from server.errors import ModelError
from server.progress import Progress

# Shares of the time that the steps take: imports, opening the file, its tensors, the tokenizer, writing.
_IMPORTED, _OPENED, _LOADED, _TOKENIZER_DONE = 0.2, 0.45, 0.7, 0.9


def convert(gguf: Path, folder: Path, progress: Progress, keep_open: tuple[int, ...] = ()) -> None:
    """Convert ``gguf`` into ``folder``, which must not exist yet.

    Args:
        gguf: the model in llama.cpp's format.
        folder: gets ``config.json``, ``model.safetensors`` in float32, the tokenizer and its chat template.
        progress: told how far it is.
        keep_open: file descriptors that the converting process holds too: a lock stays locked while it lives.

    Raises:
        ModelError: it could not be converted.
    """
    log = folder.with_suffix(".log")
    command = [sys.executable, "-m", "server.model_convert", str(gguf), str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": _import_path()}
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, pass_fds=keep_open
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                progress(float(line), "converting")
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit status {process.returncode}"
        raise ModelError(f"{gguf.name} could not be converted: {reason}")
    log.unlink()


def versions() -> dict[str, str]:
    """Versions of the packages that shape the result."""
    return {name: version(name) for name in ("torch", "transformers", "gguf")}


def _import_path() -> str:
    """Where this package lies, for a process that is started outside of the project's folder."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def _count_tensors(path: Path, report: Callable[[float], None]) -> None:
    """Report whenever ``transformers`` has decoded one more tensor of ``path``."""
    import gguf

    total = len(gguf.GGUFReader(path).tensors)
    decode = gguf.dequantize
    done = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        report(_OPENED + (_LOADED - _OPENED) * min(done / total, 1.0))
        return decode(*args, **options)

    gguf.dequantize = counted


def _begins_with_bos(path: Path) -> bool:
    """Whether the model expects every text to begin with its beginning-of-text token, which is easily lost."""
    import gguf

    field = gguf.GGUFReader(path).fields.get("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def _add_bos(tokenizer: Any) -> None:
    """Let ``tokenizer`` begin texts with its beginning-of-text token, unless it does."""
    from tokenizers.processors import TemplateProcessing

    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][0] == bos_id:
        return
    special = [(bos, bos_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=special
    )


def _convert_here(gguf: Path, folder: Path, report: Callable[[float], None]) -> None:
    """Convert in this process."""
    warnings.filterwarnings("ignore")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    report(_IMPORTED)
    _count_tensors(gguf, report)
    report(_OPENED)
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    report(_LOADED)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    if _begins_with_bos(gguf):
        _add_bos(tokenizer)
    report(_TOKENIZER_DONE)
    # The weights were quantized in the file but are not any more, and must not be announced as such.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report(1.0)


def _main() -> None:
    # Standard output carries progress and nothing else: what libraries print there goes to the log.
    with os.fdopen(os.dup(1), "w") as reports:
        os.dup2(2, 1)
        _convert_here(
            Path(sys.argv[1]), Path(sys.argv[2]), lambda fraction: print(f"{fraction:.3f}", file=reports, flush=True)
        )


if __name__ == "__main__":
    _main()
