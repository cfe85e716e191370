"""``slipstream align`` from nothing to a checkpoint that serves, on the real engine and in small."""

import json
import subprocess
import sys
from pathlib import Path

from drafter.align.corpus import Corpus
from drafter.checkpoint import load_drafter

ROOT = Path(__file__).parents[3]


def _align(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", "align", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


def test_the_target_writes_prompts_and_answers_and_a_drafter_learns_from_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shared = ("--answer-tokens", "400", "--max-answer", "48", "--concurrency", "8", "--draft-vocabulary", "512")
    result = _align("--run", str(run), "--own-prompts", "12", "--steps", "3", *shared)

    assert result.returncode == 0, result.stderr[-3000:]
    prompts = [json.loads(line) for line in (run / "own-prompts.jsonl").read_text().splitlines()]
    assert len({prompt["prompt"] for prompt in prompts}) == len(prompts) >= 10
    corpus = Corpus(run / "corpus", (2, 11, 19, 28, 30))
    assert {answer.temperature for answer in corpus.ids} >= {0.0, 0.7}
    assert len({answer.category for answer in corpus.ids}) > 3
    for index in range(len(corpus)):
        answer = corpus.read(index)
        assert all(bool(rows[:-1].any(dim=1).all()) for rows in answer.hidden.values())
    assert load_drafter(run / "checkpoint").model.config.draft_vocab_size == 512
    provenance = json.loads((run / "checkpoint" / "provenance.json").read_text())
    assert provenance["prompts"] is None and provenance["corpus"]["answers"] == len(corpus)
    assert "12 prompts" not in (run / "checkpoint" / "README.md").read_text()
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in result.stderr

    again = _align("--run", str(run), "--own-prompts", "12", "--steps", "3", *shared)
    assert again.returncode == 0 and "starting the engine" not in again.stderr

    other = _align("--run", str(run), "--own-prompts", "12", "--steps", "4", *shared)
    assert other.returncode == 2
    assert "other options" in other.stderr.splitlines()[-1]

    further = tmp_path / "further"
    further.mkdir()
    (further / "corpus").symlink_to(run / "corpus")
    arguments = ("--answer-tokens", "400", "--own-prompts", "12", "--from", str(run / "checkpoint"))
    result = _align("--run", str(further), *arguments, "--steps", "2", "--observed-share", "0.5")
    assert result.returncode == 0 and "starting the engine" not in result.stderr, result.stderr[-3000:]
    assert load_drafter(further / "checkpoint").model.config == load_drafter(run / "checkpoint").model.config
    training = json.loads((further / "checkpoint" / "provenance.json").read_text())["training"]
    assert training["observed_share"] == 0.5 and training["copied_layers"] == []
    assert training["initial"]["name"] == "checkpoint" and str(tmp_path) not in json.dumps(training)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    missing = _align("--run", str(tmp_path / "run"), "--prompts", str(tmp_path / "none.jsonl"))
    assert missing.returncode == 2 and "none.jsonl" in missing.stderr and "Traceback" not in missing.stderr
    nothing = _align("--run", str(tmp_path / "run"))
    assert nothing.returncode == 2 and "--prompts FILE, or --own-prompts N" in nothing.stderr
    layers = _align("--run", str(tmp_path / "run"), "--own-prompts", "2", "--target-layers", "1,2")
    assert layers.returncode == 2 and "--target-layers = 1,2" in layers.stderr
    nowhere = _align("--run", str(tmp_path / "run"), "--own-prompts", "2", "--from", str(tmp_path / "nowhere"))
    assert nowhere.returncode == 2 and "is not a drafter checkpoint" in nowhere.stderr.splitlines()[-1]
    for flag in ("--observed-share", "--follow-ups"):
        share = _align("--run", str(tmp_path / "run"), "--own-prompts", "2", flag, "1.5")
        assert share.returncode == 2 and f"{flag} = 1.5" in share.stderr.splitlines()[-1]
