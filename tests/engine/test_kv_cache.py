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
        self.contents: dict[int, str] = {}  # a letter for each block up to the end of this one

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
        for block in blocks:
            self.contents.pop(block, None)
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

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data())
    def remember(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from([blocks for blocks in self.holders if blocks]))
        unknown = [block for block in blocks if block not in self.contents]
        chain, text = 0, ""
        for block in unknown[:2]:
            letter = data.draw(st.sampled_from("ab"))
            chain, text = self.pool.remember(block, chain, tuple(letter * BLOCK_SIZE)), text + letter
            if text not in self.contents.values():
                self.contents[block] = text

    @rule(text=st.text("ab", min_size=1, max_size=3))
    def find(self, text: str) -> None:
        tokens = [letter for letter in text for _ in range(BLOCK_SIZE)]
        blocks, _ = self.pool.find(tokens, len(text))
        for length, block in enumerate(blocks, start=1):
            assert self.contents[block] == text[:length]
        self.pool.share(blocks)
        self.holders.append(blocks)

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


def block_of(letter: str) -> tuple[int, ...]:
    """Tokens that fill a block."""
    return (ord(letter),) * BLOCK_SIZE


def test_what_is_idle_longest_goes_first_and_the_end_of_a_sequence_before_its_start() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(3)
    chain = 0
    for block, letter in zip(blocks, "abc", strict=True):
        chain = pool.remember(block, chain, block_of(letter))
    pool.release(blocks)
    tokens = [*block_of("a"), *block_of("b"), *block_of("c")]
    assert pool.find(tokens, 3)[0] == blocks
    held = pool.allocate(1)  # never used before
    assert pool.find(tokens, 3)[0] == blocks
    held += pool.allocate(1)
    assert held[1] == blocks[2]
    assert pool.find(tokens, 3)[0] == blocks[:2]
    assert pool.num_free == 2


def use(pool: BlockPool, letters: str) -> bool:
    """A sequence of these blocks, computed and ended; returns whether the first was known."""
    blocks, chain = pool.find([token for letter in letters for token in block_of(letter)], len(letters))
    pool.share(blocks)
    new = pool.allocate(len(letters) - len(blocks))
    for block, letter in zip(new, letters[len(blocks) :], strict=True):
        chain = pool.remember(block, chain, block_of(letter))
    pool.release(blocks + new)
    return bool(blocks)


def test_memory_is_used_for_the_first_time_only_where_it_proves_useful() -> None:
    pool = BlockPool(100)
    for letters in ("ab", "cd", "ef", "gh"):
        use(pool, letters)
    assert [use(pool, letters) for letters in ("gh", "ef")] == [True, True]  # what runs, and as much again
    assert not use(pool, "cd")  # given up too early: from now on twice as much
    assert [use(pool, letters) for letters in ("ij", "kl", "cd", "ij", "kl")] == [False, False, True, True, True]
    for letter in "mnopqrstuv":
        use(pool, letter)
    assert sorted(pool.allocate(pool.num_blocks)) == list(range(1, 100))


def test_a_pool_that_spares_nothing_forgets_nothing_while_there_is_room() -> None:
    pool = BlockPool(100, sparing=False)
    for letters in ("ab", "cd", "ef", "gh"):
        use(pool, letters)
    assert use(pool, "ab")


def test_the_same_tokens_are_found_only_behind_the_same_tokens() -> None:
    pool = BlockPool(5)
    first, second, other = pool.allocate(3)
    chain = pool.remember(first, 0, block_of("a"))
    pool.remember(second, chain, block_of("b"))
    pool.remember(other, 0, block_of("c"))
    assert pool.find([*block_of("a"), *block_of("b")], 2)[0] == [first, second]
    assert pool.find([*block_of("c"), *block_of("b")], 2)[0] == [other]
    assert pool.find([*block_of("b")], 1)[0] == []
    assert pool.find([*block_of("a"), *block_of("b")], 1)[0] == [first]


def test_of_two_blocks_that_hold_the_same_one_is_known() -> None:
    pool = BlockPool(5)
    first, second = pool.allocate(2)
    chain = pool.remember(first, 0, block_of("a"))
    assert pool.remember(second, 0, block_of("a")) == chain
    assert pool.find(block_of("a"), 1) == ([first], chain)


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_a_pool_needs_a_block_besides_the_one_for_padding(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(num_blocks)


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (BLOCK_SIZE, 1), (BLOCK_SIZE + 1, 2)])
def test_a_block_more_is_needed_from_the_first_token_over(num_tokens: int, blocks: int) -> None:
    assert blocks_for(num_tokens) == blocks
