import warnings
from pathlib import Path

from drafter.options import PathSearch, ProposalOptions
from server.serving import Served, _engine_shape
from server.settings import Settings, SpeculationSettings


def test_every_setting_of_drafting_reaches_the_drafter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    speculation = SpeculationSettings(
        max_draft_tokens=3,
        path="walk",
        beam_width=2,
        max_passes=4,
        observe_threshold=0.5,
        calibrated_threshold=True,
        stop_at_end=False,
        coupled_sampling=False,
    )
    served = Served(Settings(speculation=speculation), tmp_path, "m", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's imports warn of their own accord
        _, options = _engine_shape(served)
    proposal = ProposalOptions(
        max_draft_tokens=3,
        path=PathSearch.WALK,
        beam_width=2,
        max_passes=4,
        observe_threshold=0.5,
        calibrated_threshold=True,
        stop_at_end=False,
        coupled_sampling=False,
    )
    assert options.drafter.proposal == proposal
    default = ProposalOptions(max_draft_tokens=5)
    assert all(getattr(proposal, name) != getattr(default, name) for name in proposal.__slots__ if name != "path")
