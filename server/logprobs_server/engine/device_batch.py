"""The rows of one step as a device wants them: in few shapes, with the places of their keys and values.

Everything is padded to buckets, so that shapes return: rows, the width of block tables, how many chunks attend together
and how long they are. Knows blocks and positions, nothing of weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.kv_cache import BLOCK_SIZE, blocks_for

__all__ = [
    "ALIGNED_BLOCKS",
    "WIDE",
    "Batch",
    "Group",
    "GroupShape",
    "Padding",
    "Shape",
    "batch_of",
    "numbers_of",
    "shape_of",
]

ALIGNED_BLOCKS = 8
"""Blocks, 256 keys, that attention starts at multiples of, and the narrowest block table: no kernel that goes through
keys in pieces of up to 256 then cuts them at other positions because a table is wider or a window starts later."""
_LEAST_DECODING, _LEAST_LENGTH, _LEAST_WIDTH = 8, 32, 32
"""In steps with prompts, which are of so many kinds that few would return in finer buckets: the least number of tokens
that decode, length of a prompt's chunk where it attends, and width of its block table."""
WIDE = 4
"""Tiles that make a wide one. Products of a wide tile take no longer than those of two tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """How rows are filled up: to one or two tiles, or wide ones. What those added store goes to `slot`, for nobody."""

    tile: int
    slot: int

    def rows(self, count: int) -> int:
        """Rows of a batch that has to hold `count`."""
        size = self.tile if count <= 2 * self.tile else WIDE * self.tile
        return -(-count // size) * size


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """How many chunks attend together, the length to which they are padded, and the width of their block tables."""

    count: int
    length: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a batch: what is done for it is the same whatever the numbers are.

    leading: the first group's queries are the first rows: tokens that decode, which the scheduler puts first.
    """

    rows: int
    groups: tuple[GroupShape, ...]
    leading: bool


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
    order: Tensor
    groups: Sequence[Group]


def shape_of(chunks: Sequence[Chunk], padding: Padding) -> Shape:
    """The bucket that chunks fall into."""
    members = _members(chunks)
    decoding = members[-1][0] == 1
    groups = tuple(
        GroupShape(
            count=_bucket(len(group), 1 if decoding or length > 1 else _LEAST_DECODING),
            length=length,
            width=_bucket(
                max(_num_blocks(chunk) for chunk, _ in group), ALIGNED_BLOCKS if length == 1 else _LEAST_WIDTH
            ),
        )
        for length, group in members
    )
    shortest, group = members[0]
    leading = shortest == 1 and group[-1][1] == len(group) - 1
    count = max(sum(len(chunk.token_ids) for chunk in chunks), groups[0].count if leading else 0)
    return Shape(rows=padding.rows(count), groups=groups, leading=leading)


def numbers_of(chunks: Sequence[Chunk], shape: Shape, padding: Padding) -> list[int]:
    """What `batch_of` reads, for chunks that fall into this bucket."""
    token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
    added = shape.rows - len(token_ids)
    order, queries = [0] * shape.rows, 0
    grouped: list[int] = []
    for group, (length, members) in zip(shape.groups, _members(chunks), strict=True):
        for place, (chunk, first) in enumerate(members):
            count = len(chunk.token_ids)
            order[first : first + count] = range(queries + place * length, queries + place * length + count)
        queries += group.count * length
        grouped += _group_numbers(group, members)
    numbers = token_ids + [0] * added
    numbers += [p for chunk in chunks for p in range(chunk.start, chunk.start + len(chunk.token_ids))] + [0] * added
    numbers += [slot for chunk in chunks for slot in _slots(chunk)] + [padding.slot] * added
    return numbers + order + grouped


def batch_of(numbers: Tensor, shape: Shape) -> Batch:
    """The batch as views of `numbers`, which may be filled anew."""
    token_ids, positions, slots, order = numbers[: 4 * shape.rows].view(4, shape.rows)
    groups, left = [], numbers[4 * shape.rows :]
    for index, group in enumerate(shape.groups):
        queries = group.count * group.length
        sizes = [queries, group.count, group.count * group.width]
        rows, starts, tables, left = torch.split(left, [*sizes, len(left) - sum(sizes)])
        groups.append(
            Group(
                rows=slice(queries) if shape.leading and index == 0 else rows,
                starts=starts,
                tables=tables.view(group.count, group.width),
                length=group.length,
            )
        )
    return Batch(token_ids=token_ids, positions=positions, slots=slots, order=order, groups=groups)


def _members(chunks: Sequence[Chunk]) -> list[tuple[int, list[tuple[Chunk, int]]]]:
    """Chunks, each with its first row, by the length that they are padded to, the shortest first."""
    members: defaultdict[int, list[tuple[Chunk, int]]] = defaultdict(list)
    row = 0
    for chunk in chunks:
        count = len(chunk.token_ids)
        members[1 if count == 1 else _bucket(count, _LEAST_LENGTH)].append((chunk, row))
        row += len(chunk.token_ids)
    return sorted(members.items())


def _group_numbers(group: GroupShape, members: Sequence[tuple[Chunk, int]]) -> list[int]:
    """Rows, starts and tables of chunks padded to a group: added queries are their chunk's last row again."""
    added = group.count - len(members)
    rows = [first + min(i, len(chunk.token_ids) - 1) for chunk, first in members for i in range(group.length)]
    starts = [chunk.start for chunk, _ in members]
    tables = [block for chunk, _ in members for block in _table(chunk, group.width)]
    return rows + [0] * added * group.length + starts + [0] * added + tables + [0] * added * group.width


def _bucket(count: int, least: int) -> int:
    """The least power of two that is not below `count`, nor below `least`."""
    return max(least, 1 << (count - 1).bit_length())


def _num_blocks(chunk: Chunk) -> int:
    """Blocks in use once the chunk is computed."""
    return blocks_for(chunk.start + len(chunk.token_ids))


def _table(chunk: Chunk, width: int) -> list[int]:
    """The blocks in use, and block 0 behind them: what an unused block holds must not reach sums, not even times 0."""
    used = _num_blocks(chunk)
    return [*chunk.blocks[:used], *[0] * (width - used)]


def _slots(chunk: Chunk) -> list[int]:
    return [
        chunk.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for position in range(chunk.start, chunk.start + len(chunk.token_ids))
    ]
