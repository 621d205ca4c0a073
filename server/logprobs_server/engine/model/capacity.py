"""How many blocks a model's KV cache gets, of the memory there is."""

from __future__ import annotations

import psutil
import torch

from logprobs_server.engine.kv_cache import blocks_for
from logprobs_server.engine.model.checkpoint import LoadOptions, ModelNotServableError
from logprobs_server.engine.types import ModelDescription

__all__ = ["blocks_that_fit"]

_KV_SHARE = 0.5
"""Share of the free memory that the KV cache takes at most when its size is not set."""


def blocks_that_fit(
    block_bytes: int,
    description: ModelDescription,
    options: LoadOptions,
    device: torch.device,
) -> int:
    """Blocks of the KV cache, the unused block 0 included.

    Args:
        block_bytes: what keys and values of a block take in all layers.
    Raises:
        ModelNotServableError: two sequences as long as the context do not fit.
    """
    kv_cache_bytes = options.kv_cache_bytes
    if kv_cache_bytes is None:
        useful = options.max_sequences * blocks_for(description.context_length) * block_bytes
        kv_cache_bytes = min(useful, int(_KV_SHARE * _free_memory(device)))
    blocks = kv_cache_bytes // block_bytes
    least = 2 * blocks_for(description.context_length)
    if blocks < least:
        needed = least * block_bytes
        raise ModelNotServableError(
            f"{description.name}: a KV cache of {kv_cache_bytes:,} bytes is too small for a context of "
            f"{description.context_length} tokens, which needs {needed:,}; set a shorter context length"
        )
    return 1 + blocks


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
