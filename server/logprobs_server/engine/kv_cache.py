"""The KV cache's bookkeeping: which blocks are free, and how many sequences hold each.

Blocks are numbers here; the keys and values themselves belong to the model. Paged KV cache: arXiv:2309.06180.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

__all__ = ["BLOCK_SIZE", "BlockPool", "blocks_for"]

BLOCK_SIZE = 32
"""Tokens whose keys and values one block holds; kBlock in kernels/attention.h."""

_GROWTH = 2
"""Blocks used, of those ever held at once, until more prove useful."""
_Content = tuple[int, tuple[int, ...]]
"""The number that stands for the tokens before a block, and the block's own."""


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """Hands out blocks, counts their holders, and knows what full ones hold. Block 0 is never handed out: padding
    points at it.

    A known block that nobody holds counts as free, but can be found again until its room is needed; the one that was
    held longest ago goes first. What a block holds is told by its tokens and by a number that stands for all before
    them, so that nothing but the very same tokens is ever found.

    On a CPU, memory that was never used costs more to use for the first time than most known blocks ever spare. So a
    sparing pool uses blocks for the first time only as far as sequences hold them, and as many again; twice as many
    whenever tokens are asked for whose block would still be known had more been used.
    """

    def __init__(self, num_blocks: int, *, sparing: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks: {num_blocks} is below 2")
        self._free: list[int] = []
        self._used = 1  # blocks from this on have never been used
        self._most_held, self._growth = 0, _GROWTH if sparing else num_blocks
        self._given_up: set[int] = set()  # hashes of what was known in blocks that were used again before all were used
        self._holders = [0] * num_blocks
        self._idle: dict[int, None] = {}  # known, held by nobody, longest idle first
        self._known: dict[_Content, int] = {}
        self._contents: dict[int, _Content] = {}
        self._chains: dict[int, int] = {}  # the number that stands for all tokens up to the end of a known block
        self._next_chain = itertools.count(1)
        self.num_blocks = num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._idle) + self.num_blocks + 1 - self._used

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks, each held once from now on.

        Raises:
            ValueError: fewer are free; nothing changes.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} are free")
        self._most_held = max(self._most_held, self.num_blocks - self.num_free + count)
        blocks = [self._free.pop() if self._free else self._next() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these blocks."""
        for block in blocks:
            assert self._holders[block] > 0 or block in self._idle, f"block {block} is free"
            self._idle.pop(block, None)
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder fewer for each of these blocks; without holders a block is free. Of a sequence's blocks the last
        become idle first: those before them are of use without them, not the other way round."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is free"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._contents:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def remember(self, block: int, chain: int, token_ids: tuple[int, ...]) -> int:
        """Makes a full block known: it holds these tokens after those that `chain` stands for (0: it is the first).

        Returns:
            What stands for all tokens up to its end. Of several blocks that hold the same the first stays known.
        """
        content = (chain, token_ids)
        known = self._known.setdefault(content, block)
        if known == block:
            self._contents[block] = content
            self._chains[block] = next(self._next_chain)
        return self._chains[known]

    def find(self, token_ids: Sequence[int], most: int) -> tuple[list[int], int]:
        """Known blocks that hold the first of these tokens, at most `most`, and what stands for all they hold."""
        blocks: list[int] = []
        chain = 0
        for start in range(0, most * BLOCK_SIZE, BLOCK_SIZE):
            content = (chain, tuple(token_ids[start : start + BLOCK_SIZE]))
            block = self._known.get(content)
            if block is None:
                if hash(content) in self._given_up:
                    self._growth *= 2
                    self._given_up.clear()
                break
            blocks.append(block)
            chain = self._chains[block]
        return blocks, chain

    def _next(self) -> int:
        """A block that has never been used, or the one that has been idle longest, known no more."""
        if self._used <= self.num_blocks and (not self._idle or self._used <= self._growth * self._most_held):
            self._used += 1
            return self._used - 1
        block = next(iter(self._idle))
        content = self._contents.pop(block)
        del self._idle[block], self._known[content], self._chains[block]
        if self._used <= self.num_blocks:
            if len(self._given_up) == self.num_blocks:
                self._given_up.clear()
            self._given_up.add(hash(content))
        return block
