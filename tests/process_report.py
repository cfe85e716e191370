"""Tests that need an engine to themselves: a module runs as a process and prints what it saw as one JSON line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from server.launcher import environment, this_machine


def report_of(module: str, *arguments: Path) -> Any:
    """What ``python -m module arguments`` prints last, run as the command line would run an engine."""
    result = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[1],
        env=environment(os.environ, this_machine()),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])
