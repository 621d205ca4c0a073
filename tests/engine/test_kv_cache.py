"""Blocks are handed out to one holder at a time, shared on purpose only, and all come back."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from logprobs_server.engine.kv_cache import BLOCK_SIZE, BlockPool, blocks_for

NUM_BLOCKS = 12


class BlockPoolMachine(RuleBasedStateMachine):
    """Compares the pool with a plain count of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.holders: list[list[int]] = []

    @property
    def held(self) -> Counter[int]:
        """How many hold each block."""
        return Counter(block for blocks in self.holders for block in blocks)

    @rule(count=st.integers(0, NUM_BLOCKS))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            with pytest.raises(ValueError, match="blocks asked for"):
                self.pool.allocate(count)
            return
        before = self.held
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & set(before)
        assert all(0 < block < NUM_BLOCKS for block in blocks)
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.holders))
        part = blocks[: data.draw(st.integers(0, len(blocks)))]
        self.pool.share(part)
        self.holders.append(part)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @invariant()
    def free_blocks_are_those_that_nobody_holds(self) -> None:
        assert self.pool.num_free == self.pool.num_blocks - len(self.held)

    def teardown(self) -> None:
        for blocks in self.holders:
            self.pool.release(blocks)
        assert sorted(self.pool.allocate(self.pool.num_blocks)) == list(range(1, NUM_BLOCKS))


TestBlockPool = BlockPoolMachine.TestCase


def test_a_block_that_is_free_can_be_neither_shared_nor_released() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    pool.release(blocks)
    for act in (pool.share, pool.release):
        with pytest.raises(AssertionError, match="is free"):
            act(blocks)
    assert pool.num_free == 2


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_a_pool_needs_a_block_besides_the_one_for_padding(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(num_blocks)


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (BLOCK_SIZE, 1), (BLOCK_SIZE + 1, 2)])
def test_a_block_more_is_needed_from_the_first_token_over(num_tokens: int, blocks: int) -> None:
    assert blocks_for(num_tokens) == blocks
