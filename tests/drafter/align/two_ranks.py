"""Running a script in two processes that train together, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path


def run_on_two_ranks(script: str, folder: Path) -> None:
    """Run ``script`` under ``torchrun`` with ``folder`` as its first argument and its working directory."""
    file = folder / "two.py"
    file.write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(file), str(folder)], capture_output=True, text=True, timeout=300, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
