"""Which full blocks are in the KV cache, under the hash of everything up to their end.

Whoever references a block references all before it, and releases them last first. So a block is
always released after its successors, eviction eats a chain from its end, and the predecessor of a
cached block is cached: no entry is out of reach of `match`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.engine.block_pool import BlockPool


class PrefixCache:
    """Hands out blocks and finds those that were computed before.

    Args:
        pool: The blocks; only this cache may change it.
        is_enabled: False finds and keeps nothing.
    """

    def __init__(self, pool: BlockPool, *, is_enabled: bool) -> None:
        self.is_enabled = is_enabled
        self._pool = pool
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        # What changed since `take_events`, as ordered sets; neither outgrows the pool.
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can give, cached and unreferenced ones included."""
        return self._pool.num_free

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest cached prefix of a chain, without referencing them."""
        blocks: list[int] = []
        if not self.is_enabled:
            return blocks
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def has_room(self, matched: Sequence[int], num_new_blocks: int) -> bool:
        """Return whether `matched` can be acquired and `num_new_blocks` allocated after that."""
        num_revived = sum(self._pool.ref_count(block) == 0 for block in matched)
        return num_revived + num_new_blocks <= self._pool.num_free

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of the blocks that `match` returned."""
        for block in blocks:
            self._pool.acquire(block)

    def allocate(self, num_new_blocks: int) -> list[int]:
        """Return blocks to write to; the least recently used entries are evicted for them."""
        blocks = []
        for _ in range(num_new_blocks):
            block = self._pool.allocate()
            evicted = self._hash_of.pop(block, None)
            if evicted is not None:
                del self._block_of[evicted]
                self._note(evicted, self._removed, self._added)
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take a reference from each block of a sequence's table; cached ones stay cached."""
        for block in reversed(blocks):
            self._pool.release(block, keep=block in self._hash_of)

    def register(self, block_hash: bytes, block: int) -> int:
        """Enter a block that is full and computed; return the block to use from now on.

        Two sequences may have computed the same block at once. Then the one that was entered first
        stays: it gains the caller's reference, and the caller's own block is free again.

        Args:
            block_hash: Of the tokens up to the block's end.
            block: The caller holds its only reference.
        """
        if not self.is_enabled:
            return block
        known = self._block_of.get(block_hash)
        if known is None:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self._note(block_hash, self._added, self._removed)
            return block
        self._pool.acquire(known)
        self._pool.release(block, keep=False)
        return known

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """Return the hashes added and removed since the last call, each in order.

        A hash that came and went in between is in neither: an index that removes and adds these
        equals `hashes()`.
        """
        events = list(self._added), list(self._removed)
        self._added.clear()
        self._removed.clear()
        return events

    def hashes(self) -> list[bytes]:
        """Return the hashes of all cached blocks, in the order in which they were entered."""
        return list(self._block_of)

    def check_invariants(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that the books are right.

        Args:
            tables: The block tables of all sequences that hold blocks.
        """
        self._pool.check_invariants()
        counts = [0] * self._pool.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        for block, count in enumerate(counts):
            assert self._pool.ref_count(block) == count, f"{block=}: {count} tables hold it"
        assert {block: h for h, block in self._block_of.items()} == self._hash_of
        assert self._added.keys() <= self._block_of.keys()
        assert not self._removed.keys() & self._block_of.keys()

    @staticmethod
    def _note(block_hash: bytes, into: dict[bytes, None], opposite: dict[bytes, None]) -> None:
        """Note an event, or undo the opposite one that nobody has seen yet."""
        if block_hash in opposite:
            del opposite[block_hash]
        else:
            into[block_hash] = None
