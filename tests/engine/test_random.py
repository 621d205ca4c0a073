"""Random numbers depend on seed, position and token id alone, and are distributed as they should be."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from logprobs_server.engine.random import VocabularyNoise, row_key
from torch import Tensor

VOCAB = 5_000
NOISE = VocabularyNoise(VOCAB, torch.device("cpu"))
SEEDS = st.integers(0, 2**53 - 1)
GOLDEN = 0x9E3779B97F4A7C15
POSITIONS = st.integers(0, 1 << 20)


def mixed(value: int) -> int:
    """SplitMix64's output function."""
    value %= 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def exponentials(keys: list[tuple[int, int]]) -> Tensor:
    """The variables themselves, [rows, vocab] float64."""
    return NOISE.log_exponentials(keys).double().exp()


@given(SEEDS, POSITIONS)
def test_the_same_seed_and_position_give_the_same_numbers(seed: int, position: int) -> None:
    first = NOISE.log_exponentials([row_key(seed, position)])
    again = VocabularyNoise(VOCAB, torch.device("cpu")).log_exponentials([row_key(7, 7), row_key(seed, position)])
    assert torch.equal(first[0], again[1])


@given(SEEDS, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=50))
def test_some_tokens_get_the_numbers_they_have_among_all(seed: int, token_ids: list[int]) -> None:
    keys = [row_key(seed, 0), row_key(seed, 1)]
    whole, some = NOISE.log_exponentials(keys), NOISE.log_exponentials(keys, torch.tensor([token_ids, token_ids]))
    assert torch.equal(some, whole[:, token_ids])


@given(SEEDS, POSITIONS)
def test_numbers_are_finite(seed: int, position: int) -> None:
    assert NOISE.log_exponentials([row_key(seed, position)]).isfinite().all()


@given(SEEDS, POSITIONS, st.integers(0, VOCAB - 1))
def test_numbers_are_those_of_the_hash_in_plain_integers(seed: int, position: int, token_id: int) -> None:
    key = mixed(mixed(seed + GOLDEN) + position * GOLDEN)
    bits = (token_id * 0x9E3779B1 + (key >> 32)) % 2**32
    bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32 ^ key % 2**32
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
    uniform = ((bits ^ bits >> 16) % 2**31 + 0.5) / 2**31
    seen = NOISE.log_exponentials([row_key(seed, position)])[0, token_id].item()
    assert math.isclose(seen, math.log(-math.log1p(-min(uniform, 1 - 2**-24))), abs_tol=1e-5)


def test_keys_differ_between_seeds_and_positions() -> None:
    keys = {row_key(seed, position) for seed in range(300) for position in range(300)}
    assert len(keys) == 300 * 300


def test_numbers_are_exponentially_distributed() -> None:
    values = exponentials([row_key(seed, 0) for seed in range(200)]).flatten().sort().values
    count = len(values)
    distance = (1 - (-values).exp() - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 2 / count**0.5  # Kolmogorov and Smirnov; passed once in 1,500 times


def test_numbers_of_neighbouring_tokens_positions_and_seeds_are_not_correlated() -> None:
    grid = torch.stack([exponentials([row_key(seed, position) for position in range(50)]) for seed in range(20)])
    centred = grid - 1  # [seeds, positions, tokens], mean 0, variance 1
    for axis in range(3):
        length = grid.shape[axis] - 1
        product = centred.narrow(axis, 0, length) * centred.narrow(axis, 1, length)
        assert product.mean().abs() < 4 / product.numel() ** 0.5
