"""Verifying drafts with position-keyed noise: pure tensors, though vLLM is imported."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.noise import sample_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn of their own accord
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    from scheduler.vllm_sampler import PositionKeyedRejectionSampler, PositionKeyedSampler, StepKeys, accept_equal

VOCAB = 6
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def naive_accept(drafts: list[list[int]], samples: list[list[int]], bonus: list[int], width: int) -> list[list[int]]:
    rows = []
    for draft, sample, last in zip(drafts, samples, bonus, strict=True):
        emitted = []
        for wanted, token in zip(draft, sample, strict=True):
            emitted.append(token)
            if wanted != token:
                break
        else:
            emitted.append(last)
        rows.append(emitted + [-1] * (width + 1 - len(emitted)))
    return rows


def accept(drafts: list[list[int]], samples: list[list[int]], bonus: list[int], width: int) -> list[list[int]]:
    flat_drafts, flat_samples = (
        torch.tensor([token for row in rows for token in row], dtype=torch.int64) for rows in (drafts, samples)
    )
    counts = [len(draft) for draft in drafts]
    output = accept_equal(flat_drafts.int(), flat_samples, counts, torch.tensor(bonus)[:, None], width)
    assert output.dtype == torch.int32
    rows: list[list[int]] = output.tolist()
    return rows


@pytest.mark.parametrize(
    ("draft", "sample", "emitted"),
    [
        ([], [], [9, -1, -1, -1]),
        ([1], [1], [1, 9, -1, -1]),
        ([1], [2], [2, -1, -1, -1]),
        ([1, 2, 3], [1, 2, 3], [1, 2, 3, 9]),
        ([1, 2, 3], [1, 2, 4], [1, 2, 4, -1]),
        ([1, 2, 3], [4, 2, 3], [4, -1, -1, -1]),
        ([1, 2, 3], [1, 4, 3], [1, 4, -1, -1]),
        ([0, 0], [0, 0], [0, 0, 9, -1]),
    ],
)
def test_samples_are_emitted_up_to_the_first_that_differs(
    draft: list[int], sample: list[int], emitted: list[int]
) -> None:
    assert accept([draft], [sample], [9], 3) == [emitted]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=4), min_size=1, max_size=5))
def test_a_batch_equals_a_naive_loop(pairs: list[list[tuple[int, int]]]) -> None:
    drafts, samples = ([[pair[side] for pair in row] for row in pairs] for side in (0, 1))
    bonus = list(range(10, 10 + len(pairs)))
    assert accept(drafts, samples, bonus, 4) == naive_accept(drafts, samples, bonus, 4)


def test_placeholders_among_the_drafts_are_never_accepted() -> None:
    assert accept([[-1, -1], [3, -1]], [[3, 4], [3, 4]], [9, 9], 2) == [[3, -1, -1], [3, 4, -1]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(INT64, st.integers(0, 4000), st.integers(0, 4)), min_size=1, max_size=5))
def test_keys_of_a_step_equal_a_naive_loop(requests: list[tuple[int, int, int]]) -> None:
    seeds, positions, drafts = (list(column) for column in zip(*requests, strict=True))
    keys = StepKeys(torch.tensor(seeds), torch.tensor(positions), drafts)
    last = [(seed, position + count) for seed, position, count in requests]
    checked = [(seed, position + k) for seed, position, count in requests for k in range(count)]
    for actual, expected in ((keys.last_rows(), last), (keys.draft_rows(), checked)):
        assert [tensor.dtype for tensor in actual] == [torch.int64, torch.int64]
        assert list(zip(*(tensor.tolist() for tensor in actual), strict=True)) == expected


class Request:
    """A request whose target is a table: the logits depend on the last two tokens and on the position."""

    def __init__(self, seed: int, prompt: list[int]):
        self.seed, self.prompt, self.tokens = seed, prompt, list(prompt)
        generator = torch.Generator().manual_seed(seed & 0xFFFF)
        self._table = 2 * torch.randn(3, VOCAB, VOCAB, VOCAB, generator=generator)

    def logits(self, prefix: list[int]) -> torch.Tensor:
        return self._table[len(prefix) % 3, prefix[-2], prefix[-1]]

    def plain(self, length: int) -> list[int]:
        """The text of plain decoding."""
        tokens = list(self.prompt)
        while len(tokens) < length:
            keys = torch.tensor([self.seed]), torch.tensor([len(tokens)])
            tokens.append(int(sample_rows(self.logits(tokens)[None], *keys)))
        return tokens


def step(requests: list[Request], drafts: list[list[int]]) -> None:
    """Verify one step's drafts as the runner and the samplers do, and append what they emit."""
    keys = StepKeys(
        torch.tensor([request.seed for request in requests]),
        torch.tensor([len(request.tokens) for request in requests]),
        [len(draft) for draft in drafts],
    )
    rows = [
        request.logits(request.tokens + draft[:k])
        for request, draft in zip(requests, drafts, strict=True)
        for k in range(len(draft))
    ]
    behind = [request.logits(request.tokens + draft) for request, draft in zip(requests, drafts, strict=True)]
    sampled = sample_rows(torch.stack(rows), *keys.draft_rows()) if rows else torch.tensor([], dtype=torch.int64)
    bonus = sample_rows(torch.stack(behind), *keys.last_rows())
    flat = torch.tensor([token for draft in drafts for token in draft])
    output = accept_equal(flat, sampled, keys.drafts, bonus[:, None], max(keys.drafts))
    for request, emitted in zip(requests, output.tolist(), strict=True):
        request.tokens += [token for token in emitted if token >= 0]


@st.composite
def drafters(draw: st.DrawFn) -> Callable[[list[int], int], list[int]]:
    """Proposes for (the text of plain decoding, position): as much of it as hypothesis likes, then anything."""
    length, right = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    wrong = draw(st.lists(st.integers(0, VOCAB - 1), min_size=4, max_size=4))

    def propose(text: list[int], position: int) -> list[int]:
        return (text[position : position + right] + wrong)[:length]

    return propose


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(INT64, st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=4)), min_size=1, max_size=3),
    st.lists(st.lists(drafters(), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_whatever_is_drafted_the_text_is_that_of_plain_decoding(
    starts: list[tuple[int, list[int]]], rounds: list[list[Callable[[list[int], int], list[int]]]]
) -> None:
    requests = [Request(seed, prompt) for seed, prompt in starts]
    texts = [request.plain(len(request.prompt) + 25) for request in requests]
    for number in range(5):
        proposed = rounds[number % len(rounds)]
        drafts = [
            propose(text, len(request.tokens))
            for request, text, propose in zip(requests, texts, proposed[: len(requests)], strict=True)
        ]
        lengths = [len(request.tokens) for request in requests]
        step(requests, drafts)
        for request, before in zip(requests, lengths, strict=True):
            assert len(request.tokens) > before
    for request, text in zip(requests, texts, strict=True):
        assert request.tokens == text[: len(request.tokens)]


def test_a_perfect_draft_is_accepted_whole() -> None:
    request = Request(5, [1, 2])
    text = request.plain(30)
    for _ in range(4):
        position = len(request.tokens)
        step([request], [text[position : position + 4]])
        assert len(request.tokens) == position + 5
    assert request.tokens == text[:22]


def test_different_seeds_write_different_texts() -> None:
    first, second = Request(5, [1, 2]), Request(5, [1, 2])
    second.seed = 6
    assert first.plain(30) != second.plain(30)


SEEDS = [3, -4, 5, 6]


def metadata_of(temperatures: list[float], rows: list[int], logprobs: int | None) -> SamplingMetadata:
    """What the runner passes for the requests ``rows``; each has a top-k and a top-p of its own."""
    temperature = torch.tensor([temperatures[r] for r in rows])
    top_k, top_p = torch.tensor([VOCAB, 2, 4, VOCAB])[rows], torch.tensor([0.3, 1.0, 0.5, 1.0])[rows]
    return SamplingMetadata(
        temperature=None if not bool(temperature.any()) else temperature,
        all_greedy=not bool(temperature.any()),
        all_random=bool(temperature.all()),
        top_p=top_p,
        top_k=top_k,
        generators={},
        max_num_logprobs=logprobs,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(len(rows)),
        presence_penalties=torch.zeros(len(rows)),
        repetition_penalties=torch.ones(len(rows)),
        output_token_ids=[[] for _ in rows],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """vLLM compiles its ranking of log-probabilities, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("logprobs", "position"), [(None, 0), (None, 17), (2, 40), (2, 9)])
@pytest.mark.parametrize(
    "temperatures", [[0.0] * 4, [0.7, 1.3, 1.0, 0.2], [0.0, 1.3, 0.7, 0.0]], ids=["greedy", "random", "mixed"]
)
def test_a_verify_step_samples_each_row_as_a_plain_step_would(
    temperatures: list[float], logprobs: int | None, position: int
) -> None:
    counts, positions = [2, 0, 3, 1], [position + 5 * r for r in range(4)]
    rows = torch.randn(sum(counts) + 4, VOCAB, generator=torch.Generator().manual_seed(8))
    sampler = PositionKeyedSampler()
    samples: list[list[int]] = []
    plain_logprobs: list[list[float]] = []
    starts = [sum(counts[:r]) + r for r in range(4)]
    for r, count in enumerate(counts):
        samples.append([])
        for k in range(count + 1):
            sampler.keys = StepKeys(torch.tensor([SEEDS[r]]), torch.tensor([positions[r] + k]), [0])
            output = sampler(rows[starts[r] + k][None].clone(), metadata_of(temperatures, [r], logprobs))
            samples[-1].append(int(output.sampled_token_ids))
            plain_logprobs.append(output.logprobs_tensors.logprobs[0].tolist() if logprobs else [])
    # Two requests draft right, one wrong in the second place, one not at all.
    drafts = [sample[:-1] for sample in samples]
    drafts[2][1] = (drafts[2][1] + 1) % VOCAB
    metadata = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    metadata.bonus_logits_indices = torch.tensor([start + count for start, count in zip(starts, counts, strict=True)])
    checked = [start + k for start, count in zip(starts, counts, strict=True) for k in range(count)]
    metadata.target_logits_indices = torch.tensor(checked)
    sampler.keys = StepKeys(torch.tensor(SEEDS), torch.tensor(positions), counts)
    verify = PositionKeyedRejectionSampler(sampler)
    output = verify(metadata, None, rows.clone(), metadata_of(temperatures, [0, 1, 2, 3], logprobs))
    expected = naive_accept(drafts, [sample[:-1] for sample in samples], [sample[-1] for sample in samples], 3)
    assert output.sampled_token_ids.tolist() == expected
    assert [sum(token >= 0 for token in row) for row in expected] == [3, 1, 2, 2]
    if logprobs is None:
        assert output.logprobs_tensors is None
        return
    given = output.logprobs_tensors.logprobs.view(4, 4, -1)
    for r, row in enumerate(expected):
        for k in range(sum(token >= 0 for token in row)):
            assert given[r, k].tolist() == pytest.approx(plain_logprobs[starts[r] + k], abs=1e-5)
