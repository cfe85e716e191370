"""Writing a JSON file in one step."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.errors import BenchError

__all__ = ["write_json"]


def write_json(plain: Mapping[str, Any], path: Path) -> None:
    """Write a file in one step: readers see the old one or the new one, never half of one.

    Raises:
        BenchError: the file cannot be written.
        ValueError: a number is not finite, which JSON cannot say; the old file stays.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            json.dump(plain, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
        temporary.chmod(0o666 & ~_umask())  # temporary files are private; a report need not be
        os.replace(temporary, path)
    except OSError as error:
        raise BenchError(f"cannot write the report {path}: {error.strerror}") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
