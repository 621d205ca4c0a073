"""What the machine could do at best: bytes read from memory, and products, per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

__all__ = ["product_flops", "read_bytes"]

_READ_BYTES = 1 << 30
_SIDE = 2048


def read_bytes() -> float:
    """Bytes per second that all cores together read from memory."""
    block = torch.zeros(_READ_BYTES // 8, dtype=torch.float64)
    return _READ_BYTES / _median_s(lambda: block.sum())


def product_flops(dtype: torch.dtype) -> float:
    """Floating point operations per second of a large product in this type."""
    left, right = torch.randn(2, _SIDE, _SIDE, dtype=dtype)
    return float(2 * _SIDE**3 / _median_s(lambda: left @ right))


def _median_s(work: Callable[[], object]) -> float:
    times = []
    work()
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)
