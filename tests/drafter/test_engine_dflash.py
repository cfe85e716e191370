"""A drafter trained in DFlash's own scheme needs nothing of ours to serve: vLLM loads it and drafts the same."""

from pathlib import Path

from tests.process_report import report_of


def test_unmodified_vllm_drafts_what_we_do(tmp_path: Path) -> None:
    report = report_of("tests.drafter.dflash_in_vllm", tmp_path)
    assert len(report["vllm"]) == 6 and len({tuple(drafts) for drafts in report["vllm"].values()}) > 1
    assert report["vllm"] == report["ours"]
    assert report["same_answers"]
