import pytest
import torch

from drafter.coupled import Draws
from drafter.head import DraftHead
from drafter.noise import gumbel_noise
from drafter.options import PathSearch, ProposalOptions
from drafter.proposer import BlockDiffusionProposer
from drafter.search import make_search
from drafter.types import RandomSampling
from tests.drafter.simulated_engine import SimulatedEngine, Work
from tests.drafter.tiny import VOCAB, random_drafter, random_target, shift_config

SLOTS = 4
PROMPTS = {"a": [5, 17, 30, 2], "b": [9, 9, 21, 8, 33, 12], "c": [1, 2, 3], "d": [7, 7, 7, 7, 7]}
HOT, WARM = RandomSampling(11, 2.0), RandomSampling(-12, 0.7)


def make_engine(options: ProposalOptions, sampling: dict[str, RandomSampling]) -> SimulatedEngine:
    drafter = random_drafter(shift_config())
    if drafter.model.markov is not None:
        drafter.model.markov.logits.weight.data *= 4  # enough to change tokens
    engine = SimulatedEngine(BlockDiffusionProposer(drafter, options, "drafters/d"))
    engine.sampling = sampling
    for name, prompt in PROMPTS.items():
        engine.add(name, prompt)
    return engine


def two_steps(
    options: ProposalOptions, sampling: dict[str, RandomSampling]
) -> list[dict[str, tuple[list[int], list[float]]]]:
    """Drafts behind the prompts, and behind a step that rejects them all."""
    engine = make_engine(options, sampling)
    first = engine.step({name: Work(emitted=[7]) for name in PROMPTS})
    second = engine.step({name: Work(drafts=first[name][0][:2], emitted=[39]) for name in PROMPTS})
    return [first, second]


OPTIONS = [ProposalOptions(99, path) for path in PathSearch] + [
    ProposalOptions(99, PathSearch.BEAM, max_passes=3, observe_threshold=0.2)
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options.path} {options.max_passes}")
def test_greedy_requests_draft_the_same_beside_sampled_ones(options: ProposalOptions) -> None:
    greedy, sampled = two_steps(options, {}), two_steps(options, {"a": HOT, "b": HOT, "c": WARM, "d": WARM})
    mixed = two_steps(options, {"a": HOT, "c": WARM})
    for step in range(2):
        for name in PROMPTS:
            assert mixed[step][name] == (sampled if name in {"a", "c"} else greedy)[step][name]
        assert any(sampled[step][name][0] != greedy[step][name][0] for name in PROMPTS)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options.path} {options.max_passes}")
def test_without_coupling_sampled_requests_draft_as_greedy_ones(options: ProposalOptions) -> None:
    off = ProposalOptions(99, options.path, max_passes=options.max_passes, coupled_sampling=False)
    assert two_steps(off, {"a": HOT, "c": WARM}) == two_steps(off, {})


@pytest.mark.parametrize("path", PathSearch)
def test_a_batch_of_greedy_requests_computes_no_noise(path: PathSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Draws:
        raise AssertionError("noise was prepared")

    monkeypatch.setattr(Draws, "of", fail)
    two_steps(ProposalOptions(99, path), {})
    with pytest.raises(AssertionError, match="noise was prepared"):
        two_steps(ProposalOptions(99, path), {"d": WARM})


def naive_draft(head: DraftHead, logits: torch.Tensor, anchor: int, sampling: RandomSampling, length: int) -> list[int]:
    """What the noise makes of the likely tokens, behind a text of ``length`` tokens, where it alone decides."""
    assert head.token_ids is not None and sampling.temperature == 2
    draft, last = list[int](), anchor
    for slot, row in enumerate(logits):
        scores = (row if head.markov is None else row + head.markov(torch.tensor([last]))[0]).log_softmax(-1)
        chances, order = scores.exp().sort(descending=True)
        likely = order[chances.cumsum(0) - chances < 0.99]
        tokens = head.token_ids[likely]
        noise = gumbel_noise(torch.tensor([sampling.seed]), torch.tensor([length + slot]), VOCAB)[0]
        last = int(tokens[(scores[likely] / sampling.temperature + noise[tokens]).argmax()])
        draft.append(last)
    return draft


@pytest.mark.parametrize("path", [PathSearch.WALK, PathSearch.INDEPENDENT])
@torch.inference_mode()
def test_drafts_are_drawn_with_the_noise_of_the_positions_where_they_will_be_checked(path: PathSearch) -> None:
    drafter = random_drafter(shift_config())
    head = drafter.head(random_target())
    engine = make_engine(ProposalOptions(99, path), {"b": HOT, "d": RandomSampling(1 << 60, 2.0)})
    search = make_search(ProposalOptions(99, path), head, VOCAB)
    naive_head = head if path is PathSearch.WALK else DraftHead(head.weight, head.token_ids, None)
    # A prompt and its first token; accepted and rejected drafts; none.
    works = [
        {name: Work(emitted=[7]) for name in PROMPTS},
        {"d": Work(drafts=[1, 2, 3], emitted=[1, 2, 30]), "b": Work(drafts=[4, 5], emitted=[6]), "a": Work(run=1)},
        {"b": Work(emitted=[20]), "d": Work(emitted=[21])},
    ]
    for number, work in enumerate(works):
        forward = engine.forward(work)
        search.take(forward)
        rows = [r for r, tokens in enumerate(forward.sampled) if tokens]
        logits = 3 * torch.randn(len(rows), SLOTS, 24, generator=torch.Generator().manual_seed(number))
        anchors = torch.tensor([forward.sampled[r][-1] for r in rows])
        found = search.behind(forward, rows)(logits, anchors, None)
        for place, row in enumerate(rows):
            name = forward.request_ids[row]
            if name in engine.sampling:
                tokens = engine.requests[name].tokens
                expected = naive_draft(naive_head, logits[place], tokens[-1], engine.sampling[name], len(tokens))
                assert found.tokens[place].tolist() == expected


def test_a_sampled_request_drafts_differently_with_every_seed() -> None:
    options = ProposalOptions(99, PathSearch.BEAM)
    drafts = {str(two_steps(options, {"a": RandomSampling(seed, 2.0)})[0]["a"][0]) for seed in range(6)}
    assert len(drafts) > 3
