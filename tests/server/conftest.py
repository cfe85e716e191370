"""Running the command as a user does: in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

RunCommand = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def slipstream(tmp_path: Path) -> RunCommand:
    """Runs ``slipstream ARGUMENTS`` outside of the project's folder, without settings from the environment."""

    def run(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        return subprocess.run(
            [sys.executable, "-m", "server.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=600,  # for a busy machine; nothing here takes half a minute by itself
            cwd=tmp_path,
            env={**clean, "PYTHONPATH": str(ROOT), **(environment or {})},
        )

    return run
