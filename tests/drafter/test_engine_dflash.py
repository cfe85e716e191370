"""A drafter trained in DFlash's own scheme needs nothing of ours to serve: vLLM loads it and drafts the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

from server.launcher import environment, this_machine


def test_unmodified_vllm_drafts_what_we_do(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.drafter.dflash_in_vllm", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
        env=environment(os.environ, this_machine()),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert len(report["vllm"]) == 6 and len({tuple(drafts) for drafts in report["vllm"].values()}) > 1
    assert report["vllm"] == report["ours"]
    assert report["same_answers"]
