"""How many blocks a model's KV cache gets, of the memory there is."""

from __future__ import annotations

import psutil
import torch

from logprobs_server.engine.kv_cache import BLOCK_SIZE, blocks_for
from logprobs_server.engine.model.checkpoint import LoadOptions, ModelNotServableError
from logprobs_server.engine.types import ModelDescription

__all__ = ["blocks_that_fit"]

_KV_SHARE = 0.5
"""Share of the free memory that the KV cache takes at most when its size is not set."""


def blocks_that_fit(
    shapes: list[tuple[tuple[int, int], tuple[int, int]]],
    dtype: torch.dtype,
    description: ModelDescription,
    options: LoadOptions,
    device: torch.device,
) -> int:
    """Blocks of the KV cache, the unused block 0 included.

    Args:
        shapes: (heads, head_dim) of keys and of values, per layer.
    Raises:
        ModelNotServableError: two sequences as long as the context do not fit.
    """
    kv_cache_bytes = options.kv_cache_bytes
    token_bytes = dtype.itemsize * sum(heads * size for layer in shapes for heads, size in layer)
    if kv_cache_bytes is None:
        useful = options.max_sequences * description.context_length * token_bytes
        kv_cache_bytes = min(useful, int(_KV_SHARE * _free_memory(device)))
    blocks = kv_cache_bytes // (token_bytes * BLOCK_SIZE)
    least = 2 * blocks_for(description.context_length)
    if blocks < least:
        needed = least * token_bytes * BLOCK_SIZE
        raise ModelNotServableError(
            f"{description.name}: a KV cache of {kv_cache_bytes:,} bytes is too small for a context of "
            f"{description.context_length} tokens, which needs {needed:,}; set a shorter context length"
        )
    return 1 + blocks


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
