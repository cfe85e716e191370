import json
from pathlib import Path

import pytest

from drafter.options import PathSearch, ProposalOptions
from scheduler.options import (
    ADDITIONAL_CONFIG_KEY,
    DrafterOptions,
    EngineOptions,
    PolicyName,
    PolicyOptions,
    RecorderOptions,
    TargetWeights,
)

PROPOSAL = ProposalOptions(
    5, PathSearch.BEAM, beam_width=2, max_passes=3, observe_threshold=0.7, stop_at_end=False, coupled_sampling=False
)
POLICY = PolicyOptions(PolicyName.FLOOR, 2, 0.25, False, Path("/costs"), "a machine", True, Path("/trace"))
DRAFTER = DrafterOptions(Path("/drafters/d"), PROPOSAL, POLICY)
RECORDER = RecorderOptions(Path("/corpus"), layers=(2, 11, 30))


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(),
        EngineOptions(drafter=DRAFTER),
        EngineOptions(drafter=DrafterOptions(Path("/drafters/d"), PROPOSAL)),
        EngineOptions(recorder=RECORDER),
        EngineOptions(weights=TargetWeights.INT8, instruction_set="avx2", statistics=True),
    ],
    ids=str,
)
def test_options_survive_the_way_to_another_process(options: EngineOptions) -> None:
    travelled = json.loads(json.dumps(options.to_additional_config()))
    assert EngineOptions.from_additional_config(travelled) == options


def test_the_options_lie_under_a_key_of_their_own() -> None:
    config = EngineOptions(recorder=RECORDER).to_additional_config()
    assert config == {
        "slipstream": {
            "drafter": None,
            "recorder": {"folder": "/corpus", "layers": (2, 11, 30)},
            "weights": "exact",
            "instruction_set": "auto",
            "statistics": False,
        }
    }
    assert list(config) == [ADDITIONAL_CONFIG_KEY]


def test_what_others_put_beside_them_is_left_alone() -> None:
    config = {"other": {"drafter": 1}, **EngineOptions(recorder=RECORDER).to_additional_config()}
    assert EngineOptions.from_additional_config(config) == EngineOptions(recorder=RECORDER)


def test_no_options_mean_plain_decoding() -> None:
    assert EngineOptions.from_additional_config({}) == EngineOptions(drafter=None, recorder=None)
