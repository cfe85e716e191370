import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.coupled import Draws
from drafter.noise import gumbel_noise, sample_rows
from drafter.types import RandomSampling

VOCAB = 50
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def draws_of(*sampling: RandomSampling, position: int = 7) -> Draws:
    return Draws.of(sampling, [position + 10 * block for block in range(len(sampling))])


def random_candidates(blocks: int, beams: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[B, beams, K]``, each once in its row, and probabilities."""
    generator = np.random.default_rng(seed)
    tokens = np.stack([generator.permutation(VOCAB)[:count] for _ in range(blocks * beams)])
    chances = generator.dirichlet(np.ones(count), blocks * beams)
    shape = (blocks, beams, count)
    return tokens.reshape(shape).astype(np.int64), chances.reshape(shape).astype(np.float32)


def naive_agreement(
    sampling: RandomSampling, share: float, position: int, tokens: list[int], chances: list[float]
) -> list[float]:
    noise = gumbel_noise(torch.tensor([sampling.seed]), torch.tensor([position]), VOCAB)[0].tolist()
    powers = [
        math.exp(math.log(chance) / sampling.temperature + noise[token])
        for token, chance in zip(tokens, chances, strict=True)
    ]
    return [(1 - share) * c + share * power / sum(powers) for c, power in zip(chances, powers, strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(INT64, st.sampled_from([0.1, 0.7, 1.0, 1.4])), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(0, 1000),
)
def test_agreement_equals_a_naive_loop(keys: list[tuple[int, float]], beams: int, slot: int, seed: int) -> None:
    sampling = [RandomSampling(key, temperature) for key, temperature in keys]
    tokens, chances = random_candidates(len(keys), beams, 6, seed)
    valid = np.random.default_rng(seed).random(tokens.shape) < 0.7
    valid[..., 2] = True
    result = draws_of(*sampling).agreement(slot, tokens, chances, valid)
    assert result.dtype == np.float32
    for block, each in enumerate(sampling):
        for beam in range(beams):
            part = valid[block, beam]
            lists = tokens[block, beam][part].tolist(), chances[block, beam][part].tolist()
            expected = naive_agreement(each, 0.5 * each.temperature, 7 + 10 * block + slot, *lists)
            assert result[block, beam][part].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("temperature", [2.0, 5.0])
def test_where_the_noise_decides_the_likeliest_token_is_the_targets_own_draw(temperature: float) -> None:
    """If the drafter knew the target's distribution, all its drafts would be accepted."""
    logits = 3 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3))
    chances = logits.softmax(dim=-1)
    tokens, valid = np.arange(VOCAB)[None, None], np.ones((1, 1, VOCAB), dtype=np.bool_)
    likeliest, drawn = [], []
    for seed in (0, 12345, -3):
        draws = draws_of(RandomSampling(seed, temperature), position=400)
        for slot in range(4):
            agreement = draws.agreement(slot, tokens, chances[slot].view(1, 1, -1).numpy(), valid)
            likeliest.append(int(agreement.argmax()))
        drawn += sample_rows(logits / temperature, torch.full((4,), seed), torch.arange(400, 404)).tolist()
    assert likeliest == drawn
    assert drawn != 3 * logits.argmax(dim=-1).tolist()


def test_agreement_tells_how_often_a_near_target_draws_the_same() -> None:
    """Where the target's scores are the drafter's plus Gumbel errors, the estimate is the frequency."""
    chances = torch.tensor([0.5, 0.3, 0.2])
    tokens, valid = np.arange(3)[None, None], np.ones((1, 1, 3), dtype=np.bool_)
    estimate = draws_of(RandomSampling(5, 2.0)).agreement(1, tokens, chances.view(1, 1, 3).numpy(), valid)[0, 0]
    noise = gumbel_noise(torch.tensor([5]), torch.tensor([8]), 3)
    count = 20000
    errors = -(-torch.rand(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log()).log()
    frequencies = torch.bincount((chances.log() / 2 + noise + errors).argmax(dim=-1), minlength=3) / count
    assert frequencies.tolist() == pytest.approx(estimate.tolist(), abs=0.015)


@pytest.mark.parametrize(
    ("sampling", "share"),
    [
        (RandomSampling(1, 1.0), 0.5),
        (RandomSampling(1, 0.01), 0.005),
        (RandomSampling(1, 3.0), 1.0),
        (RandomSampling(1, 1.0, top_p=0.3), 0.15),
        (RandomSampling(1, 0.8, top_k=4), 0.3),
        (RandomSampling(1, 2.0, top_k=1), 0.0),
    ],
    ids=str,
)
def test_the_noise_has_the_more_to_say_the_flatter_the_targets_distribution(
    sampling: RandomSampling, share: float
) -> None:
    assert draws_of(sampling).shares.tolist() == pytest.approx([share])


def test_a_target_without_a_choice_is_guessed_as_ever() -> None:
    tokens, chances = random_candidates(1, 2, 6, seed=4)
    draws = draws_of(RandomSampling(9, 1.0, top_k=1))
    assert np.array_equal(draws.agreement(0, tokens, chances, np.ones(tokens.shape, dtype=np.bool_)), chances)


def test_a_token_that_the_drafter_rules_out_stays_a_number() -> None:
    tokens, chances = np.array([[[4, 5]]]), np.array([[[1.0, 0.0]]], dtype=np.float32)
    draws = draws_of(RandomSampling(9, 0.01))
    assert draws.agreement(0, tokens, chances, np.ones((1, 1, 2), dtype=np.bool_)).tolist() == [[[1.0, 0.0]]]
    alone = draws.agreement(0, tokens, chances, np.array([[[False, True]]]))
    assert np.isfinite(alone).all()
