"""The promise in full, on real engines: ``exactness_matrix`` says what that is. Takes about half an hour."""

import os
import sys
from pathlib import Path

import pytest

from bench.arguments import existing_folder
from tests.scheduler.exactness_matrix import STATE_VARIABLE, instruction_sets, run_matrix, summary


@pytest.mark.skipif(os.environ.get("SLIPSTREAM_TEST_FULL") != "1", reason="takes half an hour; make test-full runs it")
@pytest.mark.timeout(4 * 3600)
def test_no_way_of_answering_changes_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not instruction_sets():
        pytest.skip("no CPU kernels: vLLM's own layers promise no exactness")
    state = os.environ.get(STATE_VARIABLE)

    def say(text: str) -> None:
        with capsys.disabled():
            print(text, file=sys.stderr, flush=True)

    report = run_matrix(existing_folder(state) if state else tmp_path, None, (), say)

    assert [cell for cell in report.cells if cell.first_differences] == [], summary(report)
    assert report.identical == report.answers > 5000
    # What is compared must have gone through the paths that could break it, and samples must be samples.
    assert report.not_seen == ()
    assert report.sampled_otherwise > 150
