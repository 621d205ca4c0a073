"""The rows of one step as a device wants them: in few shapes, with the places of their keys and values.

Everything is padded to buckets, so that shapes return: rows, the width of block tables, the length of chunks that
attend together. Knows blocks and positions, nothing of weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.kv_cache import BLOCK_SIZE, blocks_for
from logprobs_server.engine.transfer import sent

__all__ = [
    "ALIGNED_BLOCKS",
    "Batch",
    "Group",
    "Padding",
    "decode_batch",
    "decode_numbers",
    "decode_shape",
    "mixed_batch",
]

ALIGNED_BLOCKS = 8
"""Blocks, 256 keys, that attention starts at multiples of, and the narrowest block table: no kernel that goes through
keys in pieces of up to 256 then cuts them at other positions because a table is wider or a window starts later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """How rows are filled up: to a multiple of `tile`; what those added compute is stored in `slot`, for nobody."""

    tile: int
    slot: int

    def rows(self, count: int) -> int:
        """Rows of a batch that has to hold `count`."""
        return -(-count // self.tile) * self.tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Chunks padded to one length, which attend together.

    rows: the batch's rows that are their queries, [chunks · length] or a slice of so many.
    starts: position of each chunk's first query, [chunks].
    tables: blocks of each chunk, 0 behind them, [chunks, width].
    """

    rows: Tensor | slice
    starts: Tensor
    tables: Tensor
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of a step, [rows] each, those of padding last.

    slots: where each row's key and value go.
    order: which of the groups' queries, counted through, each row is.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    groups: Sequence[Group]
    order: Tensor


def decode_shape(chunks: Sequence[Chunk]) -> tuple[int, int]:
    """The bucket of chunks that are one token each: how many, and how wide their block tables are."""
    return _bucket(len(chunks)), _width(chunks)


def decode_numbers(chunks: Sequence[Chunk], rows: int, width: int, padding: Padding) -> list[int]:
    """What `decode_batch` reads, for chunks of one token each."""
    added = padding.rows(rows) - len(chunks)
    numbers = [chunk.token_ids[0] for chunk in chunks] + [0] * added
    numbers += [chunk.start for chunk in chunks] + [0] * added
    numbers += [slot for chunk in chunks for slot in _slots(chunk)] + [padding.slot] * added
    for chunk in chunks:
        numbers += _table(chunk, width)
    return numbers + [0] * (rows - len(chunks)) * width


def decode_batch(numbers: Tensor, rows: int, width: int, padding: Padding) -> Batch:
    """The batch of `rows` chunks of one token each as views of `numbers`, which may be filled anew."""
    padded = padding.rows(rows)
    token_ids, positions, slots = numbers[: 3 * padded].view(3, padded)
    tables = numbers[3 * padded :].view(rows, width)
    order = torch.arange(padded, device=numbers.device).clamp_(max=rows - 1)
    group = Group(rows=slice(rows), starts=positions[:rows], tables=tables, length=1)
    return Batch(token_ids=token_ids, positions=positions, slots=slots, groups=[group], order=order)


def mixed_batch(chunks: Sequence[Chunk], padding: Padding, device: torch.device) -> Batch:
    """The batch of chunks of any lengths; those whose lengths have one bucket attend together."""
    members: defaultdict[int, list[tuple[Chunk, int]]] = defaultdict(list)
    row = 0
    for chunk in chunks:
        members[_bucket(len(chunk.token_ids))].append((chunk, row))
        row += len(chunk.token_ids)
    added = padding.rows(row) - row
    order, queries = [0] * padding.rows(row), 0
    for length, group in members.items():
        for chunk, first in group:
            count = len(chunk.token_ids)
            order[first : first + count] = range(queries, queries + count)
            queries += length
    token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
    positions = [p for chunk in chunks for p in range(chunk.start, chunk.start + len(chunk.token_ids))]
    slots = [slot for chunk in chunks for slot in _slots(chunk)]
    return Batch(
        token_ids=sent(token_ids + [0] * added, device),
        positions=sent(positions + [0] * added, device),
        slots=sent(slots + [padding.slot] * added, device),
        groups=[_group(length, group, device) for length, group in members.items()],
        order=sent(order, device),
    )


def _group(length: int, members: Sequence[tuple[Chunk, int]], device: torch.device) -> Group:
    """Chunks, each with its first row, padded to `length` queries: those added are the chunk's last row again."""
    width = _width([chunk for chunk, _ in members])
    rows = [first + min(i, len(chunk.token_ids) - 1) for chunk, first in members for i in range(length)]
    return Group(
        rows=sent(rows, device),
        starts=sent([chunk.start for chunk, _ in members], device),
        tables=sent([_table(chunk, width) for chunk, _ in members], device),
        length=length,
    )


def _bucket(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _num_blocks(chunk: Chunk) -> int:
    """Blocks in use once the chunk is computed."""
    return blocks_for(chunk.start + len(chunk.token_ids))


def _width(chunks: Sequence[Chunk]) -> int:
    return max(ALIGNED_BLOCKS, _bucket(max(_num_blocks(chunk) for chunk in chunks)))


def _table(chunk: Chunk, width: int) -> list[int]:
    """The blocks in use, and block 0 behind them: what an unused block holds must not reach sums, not even times 0."""
    used = _num_blocks(chunk)
    return [*chunk.blocks[:used], *[0] * (width - used)]


def _slots(chunk: Chunk) -> list[int]:
    return [
        chunk.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for position in range(chunk.start, chunk.start + len(chunk.token_ids))
    ]
