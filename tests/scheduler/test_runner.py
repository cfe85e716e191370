"""What the model runner tells the drafter of sampled requests; vLLM is imported, nothing is started."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.coupled import Draws
from drafter.types import RandomSampling, TargetForward

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn of their own accord
    from vllm import SamplingParams

    from scheduler.vllm_platform import BaseModelRunner
    from scheduler.vllm_runner import KnownRequest, SlipstreamModelRunner, random_sampling
    from scheduler.vllm_sampler import StepKeys

SAMPLED, GREEDY = SamplingParams(temperature=0.7, seed=3), SamplingParams(temperature=0.0)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, None),
        (GREEDY, None),
        (SamplingParams(temperature=0.7), RandomSampling(5, 0.7)),
        (SamplingParams(temperature=1.0, seed=9, top_k=20, top_p=0.9), RandomSampling(5, 1.0, 20, 0.9)),
        (SamplingParams(temperature=1.5, top_k=-1), RandomSampling(5, 1.5)),
    ],
)
def test_how_a_request_is_sampled(params: SamplingParams | None, expected: RandomSampling | None) -> None:
    assert random_sampling(params, 5) == expected


class Runner:
    """Our runner over a made-up batch: vLLM's bookkeeping between the steps is done here."""

    def __init__(self, prompt_lens: list[int], params: list[SamplingParams]):
        self.names = [f"r{i}" for i in range(len(prompt_lens))]
        self.runner: Any = SlipstreamModelRunner.__new__(SlipstreamModelRunner)
        count, table = len(prompt_lens), SimpleNamespace(slot_mapping=SimpleNamespace(gpu=torch.zeros(999)))
        table.get_device_tensor = lambda rows: torch.zeros(rows, 1)
        self.batch = SimpleNamespace(
            num_reqs=count,
            req_ids=self.names,
            num_prompt_tokens=np.array(prompt_lens),
            num_tokens_no_spec=np.array(prompt_lens),
            num_computed_tokens_cpu=np.zeros(count, dtype=np.int64),
            block_table=[table],
            sampling_metadata=SimpleNamespace(all_greedy=False),
        )
        requests = zip(self.names, params, strict=True)
        self.runner.__dict__.update(
            input_batch=self.batch,
            requests={name: SimpleNamespace(sampling_params=each, output_token_ids=[]) for name, each in requests},
            device=torch.device("cpu"),
            max_model_len=4096,
            sampler=SimpleNamespace(keys=None),
            input_ids=SimpleNamespace(gpu=torch.zeros(999)),
            positions=torch.zeros(999),
            _group=0,
            _known={
                name: KnownRequest.of(each, 100 + i, private=False)
                for i, (name, each) in enumerate(zip(self.names, params, strict=True))
            },
            _finished=[],
        )

    def step(self, run: list[int], drafts: list[int], emitted: list[int]) -> tuple[StepKeys, TargetForward]:
        """Run, per request, so many known tokens and drafts behind them, and emit so many; the rest is rejected."""
        metadata = SimpleNamespace(num_draft_tokens=drafts) if any(drafts) else None
        self.runner._sample(None, metadata)
        keys: StepKeys = self.runner.sampler.keys
        self.batch.num_tokens_no_spec = self.batch.num_tokens_no_spec + emitted  # vLLM's _bookkeeping_sync
        output = SimpleNamespace(
            num_scheduled_tokens={n: k + d for n, k, d in zip(self.names, run, drafts, strict=True)},
            scheduled_spec_decode_tokens={n: [0] * d for n, d in zip(self.names, drafts, strict=True) if d},
        )
        forward: TargetForward = self.runner._target_forward(output, [[1] * count for count in emitted], [])
        accepted = [max(count - 1, 0) for count in emitted]
        self.batch.num_computed_tokens_cpu = self.batch.num_computed_tokens_cpu + run + accepted
        return keys, forward


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(0, 30)), min_size=1, max_size=4),
    st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=4), max_size=4),
)
def test_drafts_are_drawn_at_the_positions_where_the_next_step_checks_them(
    prompts: list[tuple[int, int]], rounds: list[list[tuple[int, int]]]
) -> None:
    """Whatever was chunked, accepted or rejected before."""
    lengths, chunks = [length for length, _ in prompts], [min(chunk, length - 1) for length, chunk in prompts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseModelRunner, "_sample", lambda *_: None)
        runner = Runner(lengths, [SAMPLED] * len(prompts))
        runner.step(chunks, [0] * len(prompts), [0] * len(prompts))
        rest = [length - chunk for length, chunk in zip(lengths, chunks, strict=True)]
        _, forward = runner.step(rest, [0] * len(prompts), [1] * len(prompts))
        for choices in [*rounds, [(3, 0)] * 4]:
            draws = Draws.behind(forward, range(len(prompts)))
            drafts = [count for count, _ in choices[: len(prompts)]]
            emitted = [min(accepted, count) + 1 for count, accepted in choices[: len(prompts)]]
            keys, forward = runner.step([1] * len(prompts), drafts, emitted)
            assert drawn_rows(draws, drafts) == checked_rows(keys)


def drawn_rows(draws: Draws, drafts: list[int]) -> list[tuple[int, int]]:
    """Seed and position of every draft token."""
    keys = zip(draws.seeds.tolist(), draws.positions.tolist(), drafts, strict=True)
    return [(seed, position + slot) for seed, position, count in keys for slot in range(count)]


def checked_rows(keys: StepKeys) -> list[tuple[int, int]]:
    if not any(keys.drafts):
        return []
    seeds, positions = keys.draft_rows()
    return list(zip(seeds.tolist(), positions.tolist(), strict=True))


def test_only_sampled_requests_are_told_apart() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseModelRunner, "_sample", lambda *_: None)
        _, forward = Runner([4, 5, 6], [GREEDY, SAMPLED, GREEDY]).step([4, 5, 6], [0, 0, 0], [1, 1, 1])
    assert forward.sampling == [None, RandomSampling(101, 0.7), None]


@pytest.mark.parametrize("eager", [True, False])
def test_hooks_take_hidden_states_of_targets_that_run_eagerly(eager: bool) -> None:
    class Target(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Identity()])

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.layers[0](hidden)
            return 2 * output

    runner: Any = SlipstreamModelRunner.__new__(SlipstreamModelRunner)
    target = Target()
    host = SimpleNamespace(proposer=SimpleNamespace(hidden_state_layers=(1,)))
    config = SimpleNamespace(enforce_eager=eager)
    runner.__dict__.update(_host=host, model_config=config, get_model=lambda: target)
    if not eager:
        with pytest.raises(ValueError, match="hidden states of Target can be had without compilation only"):
            runner._setup_eagle3_aux_hidden_state_outputs()
        return
    runner._setup_eagle3_aux_hidden_state_outputs()
    output, (hidden,) = target(torch.tensor([3.0]))
    assert float(output) == 6.0 and float(hidden) == 3.0
