"""Sampling noise as a function of (seed, position, token id), the same for plain and drafted decoding.

A token is drawn by the Gumbel-max trick: the arg-max of log-probabilities plus independent Gumbel noise has
exactly the distribution of the probabilities. Because the noise depends on nothing but the request's seed, the
token's position and the token's id, it does not matter in which step, in which batch or on which row of a verify
pass a position is sampled: the same token comes out. For the same reason whoever drafts a token can know the noise
that it will be checked with.
"""

from hashlib import blake2b

import torch

_INT64 = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _INT64
    return value - (1 << 64) if value >> 63 else value


# Multipliers of splitmix64's finaliser and of its Weyl sequence (Steele, Lea and Flood, 2014), as signed 64-bit.
_WEYL = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64 tensors; multiplication wraps, shifts are made logical by masking."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise for rows of logits.

    Args:
        seeds: ``[n]`` int64, one per row.
        positions: ``[n]`` int64, absolute position of the token that the row samples.
        vocab_size: columns.

    Returns:
        ``[n, vocab_size]`` float64, finite everywhere.
    """
    return noise_of_tokens(seeds, positions, torch.arange(vocab_size, device=seeds.device)[None])


def noise_of_tokens(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The noise of some tokens only: the very numbers that ``gumbel_noise`` has in their columns.

    Args:
        seeds, positions: as for ``gumbel_noise``.
        token_ids: ``[n, k]`` int64, or ``[1, k]`` for the same tokens in every row.

    Returns:
        ``[n, k]`` float64.
    """
    keys = _mix(_mix(seeds + _WEYL) + positions * _WEYL)
    bits = _mix(keys[:, None] + (token_ids + 1) * _WEYL)
    # 52 bits, so that adding a half is exact and the result is never 0 or 1.
    uniform = ((bits >> 12) & 0xFFFFFFFFFFFFF).to(torch.float64).add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def sample_rows(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Draw one token per row from ``softmax(logits)``.

    Args:
        logits: ``[n, vocab]`` float32; excluded tokens are ``-inf``.
        seeds, positions: as for ``gumbel_noise``.

    Returns:
        ``[n]`` int64 token ids.
    """
    return (gumbel_noise(seeds, positions, logits.shape[1]) + logits).argmax(dim=-1)


def request_seed(seed: int | None, engine_seed: int, request_id: str) -> int:
    """The signed 64-bit seed of a request: its own if it has one, else one drawn from the engine's and its id."""
    if seed is not None:
        return _signed(seed)
    digest = blake2b(f"{engine_seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
