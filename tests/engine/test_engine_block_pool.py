from __future__ import annotations

import pytest

from cluster.engine.block_pool import BlockPool


def test_pool_gives_every_block_once() -> None:
    pool = BlockPool(3)
    assert sorted(pool.allocate() for _ in range(3)) == [0, 1, 2]
    assert pool.num_free == 0
    with pytest.raises(AssertionError, match="no block is free"):
        pool.allocate()
    pool.check_invariants()


def test_pool_block_is_free_when_the_last_reference_goes() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    pool.acquire(block)
    pool.release(block, keep=False)
    assert pool.num_free == 0
    pool.release(block, keep=False)
    assert pool.num_free == 1
    with pytest.raises(AssertionError, match="more often than acquired"):
        pool.release(block, keep=False)
    pool.check_invariants()


def test_pool_gives_kept_blocks_last_and_the_oldest_first() -> None:
    pool = BlockPool(4)
    a, b, c, d = (pool.allocate() for _ in range(4))
    pool.release(b, keep=True)
    pool.release(a, keep=True)
    pool.release(c, keep=True)
    pool.release(d, keep=False)
    pool.check_invariants()
    assert [pool.allocate() for _ in range(4)] == [d, b, a, c]


def test_pool_acquired_kept_block_is_not_given_away() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(), pool.allocate()
    pool.release(a, keep=True)
    pool.release(b, keep=True)
    pool.acquire(a)
    assert (pool.num_free, pool.ref_count(a)) == (1, 1)
    assert pool.allocate() == b
    assert pool.num_free == 0
    pool.check_invariants()
