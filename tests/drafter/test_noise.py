import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.noise import gumbel_noise, noise_of_tokens, request_seed, sample_rows

MASK = (1 << 64) - 1
WEYL, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
# What a chi-squared variable of so many degrees of freedom exceeds once in a thousand cases.
CHI_SQUARED = {7: 24.32, 9: 27.88, 15: 37.70}


def mix(x: int) -> int:
    """splitmix64's finaliser, in unsigned arithmetic."""
    x = ((x ^ (x >> 30)) * MIX_1) & MASK
    x = ((x ^ (x >> 27)) * MIX_2) & MASK
    return x ^ (x >> 31)


def unmix(x: int) -> int:
    """The inverse of ``mix``."""
    x = x ^ (x >> 31) ^ (x >> 62)
    x = (x * pow(MIX_2, -1, 1 << 64)) & MASK
    x = x ^ (x >> 27) ^ (x >> 54)
    x = (x * pow(MIX_1, -1, 1 << 64)) & MASK
    return x ^ (x >> 30) ^ (x >> 60)


def naive_noise(seed: int, position: int, token: int) -> float:
    key = mix((mix((seed + WEYL) & MASK) + position * WEYL) & MASK)
    bits = mix((key + (token + 1) * WEYL) & MASK)
    return -math.log(-math.log(((bits >> 11) + 0.5) / 2**53))


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def noise(seed: int, positions: range, vocab_size: int) -> torch.Tensor:
    return gumbel_noise(torch.full((len(positions),), seed), torch.tensor(positions), vocab_size)


def chi_squared(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probabilities))
    return float(((counts - expected) ** 2 / expected).sum())


@settings(max_examples=60, deadline=None)
@given(INT64, st.integers(0, 1 << 40))
def test_the_noise_is_splitmix64s(seed: int, position: int) -> None:
    actual = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 3)
    assert actual.dtype == torch.float64
    assert actual[0].tolist() == pytest.approx([naive_noise(seed, position, token) for token in range(3)], rel=1e-12)


def test_known_values_never_change() -> None:
    """Seeded answers are a promise: the same seed gives the same text in every version."""
    drawn = gumbel_noise(torch.tensor([7, -7]), torch.tensor([0, 5]), 2).flatten().tolist()
    assert drawn == pytest.approx([2.9735123136360695, 2.0542484626981983, 0.43634634112193477, 0.06288268514143451])
    assert request_seed(None, 0, "chatcmpl-1") == -6596279141141551253


def test_moments_are_gumbels() -> None:
    sample = noise(1, range(1000), 200).flatten()
    assert float(sample.mean()) == pytest.approx(0.5772156649, abs=0.01)
    assert float(sample.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    skewness = float(((sample - sample.mean()) ** 3).mean() / sample.std() ** 3)
    assert skewness == pytest.approx(1.1395470994, abs=0.05)


@pytest.mark.parametrize("seed", [0, 1, -1, 1 << 62])
def test_the_distribution_is_gumbels(seed: int) -> None:
    """Kolmogorov-Smirnov: the largest distance exceeds the bound once in a thousand cases."""
    sample = noise(seed, range(200), 100).flatten().sort().values
    exact = (-(-sample).exp()).exp()
    steps = torch.arange(len(sample) + 1) / len(sample)
    distance = max(float((exact - steps[:-1]).max()), float((steps[1:] - exact).max()))
    assert distance < 1.95 / math.sqrt(len(sample))


def test_neighbouring_seeds_positions_and_tokens_are_independent() -> None:
    sample = torch.stack([noise(seed, range(65), 65) for seed in range(3)])
    for left, right in (
        (sample[:-1], sample[1:]),
        (sample[:, :-1], sample[:, 1:]),
        (sample[..., :-1], sample[..., 1:]),
        (sample[:, 1:, :-1], sample[:, :-1, 1:]),
        (sample[:-1, :-1], sample[1:, 1:]),
    ):
        correlation = float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(left.numel())


def test_the_noise_is_finite_at_both_ends() -> None:
    for bits in (MASK, 0):
        # The seed whose first token at position 0 draws exactly these bits.
        key = (unmix(bits) - WEYL) & MASK
        seed = (unmix(unmix(key)) - WEYL) & MASK
        drawn = gumbel_noise(torch.tensor([signed(seed)]), torch.tensor([0]), 1)
        assert math.isfinite(float(drawn)), f"{float(drawn)} for bits {bits:#x}"


LOGITS = torch.tensor([1.5, 0.0, -1.0, 2.0, 0.5, -2.0, 1.0, -0.5])


@pytest.mark.parametrize("seed", [0, 12345, -3])
def test_samples_along_a_text_are_softmax_distributed(seed: int) -> None:
    count = 20000
    tokens = sample_rows(LOGITS.expand(count, -1), torch.full((count,), seed), torch.arange(count))
    assert chi_squared(tokens, LOGITS.double().softmax(0)) < CHI_SQUARED[7]


@pytest.mark.parametrize("position", [0, 700])
def test_samples_over_seeds_are_softmax_distributed(position: int) -> None:
    count = 20000
    tokens = sample_rows(LOGITS.expand(count, -1), torch.arange(count) - 10000, torch.full((count,), position))
    assert chi_squared(tokens, LOGITS.double().softmax(0)) < CHI_SQUARED[7]


def test_pairs_of_following_samples_are_independent() -> None:
    logits, count = torch.tensor([0.5, 0.0, -0.5, 0.2]), 20000
    seeds = torch.arange(count)
    first, second = (sample_rows(logits.expand(count, -1), seeds, torch.full((count,), p)) for p in (9, 10))
    probabilities = logits.double().softmax(0)
    assert chi_squared(4 * first + second, torch.outer(probabilities, probabilities).flatten()) < CHI_SQUARED[15]


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.full((5000, 10), -math.inf)
    logits[:, [2, 7]] = torch.tensor([0.0, 1.0])
    tokens = sample_rows(logits, torch.full((5000,), 3), torch.arange(5000))
    assert set(tokens.tolist()) == {2, 7}
    assert float((tokens == 7).double().mean()) == pytest.approx(math.e / (1 + math.e), abs=0.03)


def test_one_possible_token_is_certain() -> None:
    logits = torch.full((100, 10), -math.inf)
    logits[:, 4] = -50.0
    assert sample_rows(logits, torch.arange(100), torch.arange(100)).tolist() == [4] * 100


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(INT64, st.integers(0, 5000)), min_size=1, max_size=6))
def test_a_row_alone_draws_what_it_draws_in_a_batch(keys: list[tuple[int, int]]) -> None:
    logits = torch.randn(len(keys), 33, generator=torch.Generator().manual_seed(len(keys)))
    seeds, positions = (torch.tensor(column) for column in zip(*keys, strict=True))
    together, drawn = gumbel_noise(seeds, positions, 33), sample_rows(logits, seeds, positions)
    for i in range(len(keys)):
        row = slice(i, i + 1)
        assert torch.equal(gumbel_noise(seeds[row], positions[row], 33), together[row])
        assert torch.equal(sample_rows(logits[row], seeds[row], positions[row]), drawn[row])


def test_a_larger_vocabulary_keeps_the_noise_of_the_smaller_one() -> None:
    assert torch.equal(noise(5, range(4), 9)[:, :5], noise(5, range(4), 5))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(INT64, st.integers(0, 5000)), min_size=1, max_size=5),
    st.integers(0, 40),
    st.integers(0, 1000),
    st.booleans(),
)
def test_the_noise_of_some_tokens_has_the_bits_of_the_whole_rows(
    keys: list[tuple[int, int]], count: int, seed: int, shared: bool
) -> None:
    """A drafter that knows only some tokens' noise has to know exactly that."""
    seeds, positions = (torch.tensor(column) for column in zip(*keys, strict=True))
    rows = 1 if shared else len(keys)
    tokens = torch.randint(0, 3000, (rows, count), generator=torch.Generator().manual_seed(seed))
    whole = gumbel_noise(seeds, positions, 3000)
    assert torch.equal(noise_of_tokens(seeds, positions, tokens), whole.gather(1, tokens.expand(len(keys), -1)))


def test_no_rows_draw_nothing() -> None:
    nothing = torch.tensor([], dtype=torch.int64)
    assert sample_rows(torch.zeros(0, 4), nothing, nothing).shape == (0,)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(0, 0), (42, 42), (-5, -5), ((1 << 63) - 1, (1 << 63) - 1), (1 << 63, -(1 << 63)), (MASK, -1)],
)
def test_a_request_keeps_its_own_seed(seed: int, expected: int) -> None:
    assert request_seed(seed, 9, "a") == request_seed(seed, 10, "b") == expected


def test_requests_without_a_seed_draw_their_own() -> None:
    seeds = {request_seed(None, engine, name) for engine in (0, 1) for name in ("a", "b", "a/b")}
    assert len(seeds) == 6
    assert all(-(1 << 63) <= seed < 1 << 63 for seed in seeds)
    assert request_seed(None, 0, "a") == request_seed(None, 0, "a")
