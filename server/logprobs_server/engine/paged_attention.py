"""Attention over a block table with what torch ships: gathered keys and values, and a bias that says who sees whom.

A query's result is meant to depend on its position and keys alone: the memory-efficient kernel goes through keys from
the first to the last in pieces of one size, so that masked pieces before and behind change no bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from logprobs_server.engine.device_batch import ALIGNED_BLOCKS, Group
from logprobs_server.engine.kv_cache import BLOCK_SIZE

__all__ = ["Heads", "View", "attend", "view_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Heads that ask, heads that hold keys and values, their dimension; ALiBi slopes of the former, if any."""

    query: int
    key: int
    size: int
    scale: float
    slopes: Tensor | None

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query // self.key


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a group's queries see of their tables.

    blocks: [chunks · blocks]. bias: added to scores, [chunks, 1 or key heads, length · heads of a group, keys].
    """

    blocks: Tensor
    bias: Tensor


def view_of(group: Group, window: int, heads: Heads, dtype: torch.dtype) -> View:
    """What the queries of a layer with this window see (0: all before them), for all layers that have it."""
    tables, device = group.tables, group.tables.device
    width = tables.shape[1]
    span = (window + group.length - 2) // BLOCK_SIZE + 1 + ALIGNED_BLOCKS
    columns = torch.arange(width, device=device).expand_as(tables)
    if window > 0 and span < width:
        first = (group.starts - window + 1).clamp_(min=0).div_(ALIGNED_BLOCKS * BLOCK_SIZE, rounding_mode="floor")
        columns = first.unsqueeze(-1) * ALIGNED_BLOCKS + torch.arange(span, device=device)
        tables = tables.gather(1, columns.clamp(max=width - 1))  # beyond the table all keys are masked
    keys = (columns.unsqueeze(-1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=device)).flatten(1)  # [chunks, keys]
    queries = group.starts.unsqueeze(-1) + torch.arange(group.length, device=device)  # [chunks, length]
    distance = queries.unsqueeze(-1) - keys.unsqueeze(1)  # [chunks, length, keys]
    seen = distance >= 0
    if window > 0:
        seen &= distance < window
    return View(blocks=tables.flatten(), bias=_bias(seen, distance, heads, dtype))


def _bias(seen: Tensor, distance: Tensor, heads: Heads, dtype: torch.dtype) -> Tensor:
    """Bias as in `View`, of seen and distance [chunks, length, keys]; finite, or rows of padding would yield NaN."""
    masked = torch.finfo(dtype).min / 4
    if heads.slopes is None:
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, masked)
        return bias.unsqueeze(2).expand(-1, -1, heads.group, -1).flatten(1, 2).unsqueeze(1)
    slopes = heads.slopes.view(heads.key, 1, heads.group, 1)
    bias = distance.to(dtype)[:, None, :, None] * -slopes  # [chunks, key heads, length, heads of a group, keys]
    return bias.masked_fill_(~seen[:, None, :, None], masked).flatten(2, 3)


def attend(queries: Tensor, cache: Tensor, view: View, heads: Heads, dtype: torch.dtype) -> Tensor:
    """Attention of a group's queries.

    Args:
        queries: [chunks · length, query heads, size], of the bias's dtype.
        cache: a layer's keys and values, [blocks, BLOCK_SIZE, heads of keys, then of values, size].
        dtype: of the result.
    Returns:
        [chunks · length, query heads · size].
    """
    chunks = view.bias.shape[0]
    asking = queries.view(chunks, -1, heads.key, heads.group, heads.size)
    asking = asking.transpose(1, 2).flatten(2, 3)  # [chunks, key heads, length · heads of a group, size]
    held = cache.index_select(0, view.blocks).to(queries.dtype)
    held = held.view(chunks, -1, 2, heads.key, heads.size).transpose(1, 3)  # [chunks, key heads, 2, keys, size]
    keys, values = held.unbind(2)
    mixed = functional.scaled_dot_product_attention(asking, keys, values, attn_mask=view.bias, scale=heads.scale)
    by_query = mixed.view(chunks, heads.key, -1, heads.group, heads.size).transpose(1, 2)
    return by_query.to(dtype, memory_format=torch.contiguous_format).reshape(-1, heads.query * heads.size)
