"""The KV cache's bookkeeping: which blocks are free, and how many sequences hold each.

Blocks are numbers here; the keys and values themselves belong to the model. Paged KV cache: arXiv:2309.06180.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["BLOCK_SIZE", "BlockPool", "blocks_for"]

BLOCK_SIZE = 32
"""Tokens whose keys and values one block holds; kBlock in kernels/cpu.cpp."""


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """Hands out blocks and counts their holders. Block 0 is never handed out: padding points at it."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks: {num_blocks} is below 2")
        self._free = list(range(num_blocks - 1, 0, -1))
        self._holders = [0] * num_blocks
        self.num_blocks = num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks, each held once from now on.

        Raises:
            ValueError: fewer are free; nothing changes.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} are free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these blocks."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free"
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder fewer for each of these blocks; without holders a block is free."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)
