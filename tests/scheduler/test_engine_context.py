"""The drafter's context K/V stay right through everything the engine does with pages."""

import json
import os
import subprocess
import sys
from pathlib import Path

from server.config import load_settings
from server.drafter_store import resolve_drafter
from server.launcher import environment, this_machine
from server.model_store import resolve_model

_TOLERANCE = 1e-3  # of the largest value: hidden states of two implementations of the target, in float32


def test_cached_context_equals_a_fresh_computation() -> None:
    settings = load_settings("smollm2-cpu", {}, {})
    model = resolve_model(settings.model.source, settings.model.cache_dir)
    drafter = resolve_drafter(settings.speculation.drafter)
    result = subprocess.run(
        [sys.executable, "-m", "tests.scheduler.context_audit", str(model), str(drafter)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
        env=environment(os.environ, this_machine()),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert set(report["errors"]) == {"chunked", "hit", "other", "plain", "longest", "neighbour", "after"}
    assert report["lengths"]["longest"] >= 250
    assert report["first_positions"]["hit"] > 0  # the pages before it came from the prefix cache
    assert report["accepted"] > 0 and report["rejected"] > 0
    assert max(report["errors"].values()) < _TOLERANCE, report
