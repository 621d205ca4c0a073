"""Random numbers from counters: a function of seed, position and token id alone, the same on every device.

A step's randomness must not depend on who else is in the batch or on what was drawn before, so there is no
generator with a state. Integer arithmetic only, until one conversion to float32 at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logprobs_server.engine.transfer import sent

__all__ = ["VocabularyNoise", "row_key"]

_MASK64 = (1 << 64) - 1


def _mix64(value: int) -> int:
    """The output function of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom generators, 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)


def _int32(value: int) -> int:
    """The low 32 bits as a signed number, torch's only 32-bit integer with full support."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def row_key(seed: int, position: int) -> tuple[int, int]:
    """Two signed 32-bit keys for drawing the token at `position` (from 0) of a completion with this seed."""
    key = _mix64((_mix64((seed + 0x9E3779B97F4A7C15) & _MASK64) + position * 0x9E3779B97F4A7C15) & _MASK64)
    return _int32(key >> 32), _int32(key)


class VocabularyNoise:
    """Exponential(1) variables, one for each token of a vocabulary, for given row keys.

    The 32-bit hash is the finaliser of MurmurHash3 (Appleby) with a key added before and one in the middle.
    """

    def __init__(self, vocabulary_size: int, device: torch.device) -> None:
        ids = torch.arange(vocabulary_size, device=device, dtype=torch.int64)
        self._spread = (ids * 0x9E3779B1).to(torch.int32)  # wraps: the low 32 bits

    def log_exponentials(self, keys: list[tuple[int, int]], token_ids: Tensor | None = None) -> Tensor:
        """Logs of the variables.

        Args:
            keys: one pair per row.
            token_ids: [rows, candidates] int64; all tokens if None.
        Returns:
            [rows, candidates] float32, finite.
        """
        first, second = sent(keys, self._spread.device, torch.int32).T.unsqueeze(-1)
        spread = self._spread if token_ids is None else self._spread[token_ids]
        bits = spread + first  # [rows, candidates] int32, wrapping
        bits ^= (bits >> 16) & 0xFFFF
        bits *= _int32(0x85EBCA6B)
        bits ^= second
        bits ^= (bits >> 13) & 0x7FFFF
        bits *= _int32(0xC2B2AE35)
        bits ^= (bits >> 16) & 0xFFFF
        bits &= 0x7FFFFFFF
        # Small values win a race and keep full relative precision; the largest round to 1 and are held below it.
        uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
        logs: Tensor = uniform.neg_().log1p_().neg_().log_()
        return logs
