"""Which full blocks are in the KV cache, under the hash of everything up to their end.

Whoever references a block references all before it, and releases them last first. So a block is
always released after its successors, eviction eats a chain from its end, and the predecessor of a
cached block is cached: no entry is out of reach of `match`.

With a host tier below, what is evicted is copied there first, and what is there comes back:

    cached ──evicted──► host tier ──fill──► cached     copied before the next step computes

A step copies no more than `max_offloads` and `max_restores` say, so that those who decode beside it
do not notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.engine.block_events import BlockEvents
from cluster.engine.block_pool import BlockPool
from cluster.engine.host_tier import HostTier
from cluster.step import BlockMoves


class PrefixCache:
    """Hands out blocks and finds those that were computed before.

    Args:
        pool: The blocks; only this cache may change it.
        is_enabled: False finds and keeps nothing.
        host: The tier below, which has the same events; None is none.
        events: Hears of what comes and goes; None makes some of its own.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        is_enabled: bool,
        host: HostTier | None = None,
        events: BlockEvents | None = None,
    ) -> None:
        self.is_enabled = is_enabled
        self.max_offloads = 0  # blocks that the next step may still copy to the host tier
        self.max_restores = 0  # likewise from there
        self.num_evictions = 0
        self._pool = pool
        self._host = host
        self._events = events or BlockEvents()
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._position_of: dict[bytes, int] = {}  # of a cached block in its chain
        self._offloads: list[tuple[int, int]] = []  # of the next step: block, slot
        self._restores: list[tuple[int, int]] = []  # of the next step: slot, block
        self._held: list[bytes] = []  # in the host tier: what the next step copies

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
            evicted = self._hash_of.get(block)
            if evicted is not None:
                self.copy_to_host(evicted)
                del self._hash_of[block], self._block_of[evicted], self._position_of[evicted]
                self._events.leave(evicted)
                self.num_evictions += 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take a reference from each block of a sequence's table; cached ones stay cached."""
        for block in reversed(blocks):
            self._pool.release(block, keep=block in self._hash_of)

    def register(self, block_hash: bytes, block: int, position: int = 0) -> int:
        """Enter a block that is full and computed; return the block to use from now on.

        Two sequences may have computed the same block at once. Then the one that was entered first
        stays: it gains the caller's reference, and the caller's own block is free again.

        Args:
            block_hash: Of the tokens up to the block's end.
            block: The caller holds its only reference.
            position: Of the block in its chain.
        """
        if not self.is_enabled:
            return block
        known = self._block_of.get(block_hash)
        if known is None:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self._position_of[block_hash] = position
            self._events.enter(block_hash)
            return block
        self._pool.acquire(known)
        self._pool.release(block, keep=False)
        return known

    def fill(self, block_hash: bytes, block: int, position: int) -> int | None:
        """Enter a block whose content is in some tier; return the block to use from now on.

        Args:
            block_hash: Of the tokens up to the block's end.
            block: The caller holds its only reference; nothing is in it.
            position: Of the block in its chain.

        Returns:
            As `register`; None where no tier has it, or the next step may copy no more: see `has`.
        """
        if block_hash in self._block_of:
            return self.register(block_hash, block, position)
        if self._host is None or block_hash not in self._host or self.max_restores <= 0:
            return None
        self.max_restores -= 1
        self._held.append(block_hash)
        self._restores.append((self._host.hold(block_hash), block))
        return self.register(block_hash, block, position)

    def has(self, block_hash: bytes) -> bool:
        """Return whether any tier of this replica has a block."""
        return block_hash in self._block_of or (self._host is not None and block_hash in self._host)

    def copy_to_host(self, block_hash: bytes) -> bool:
        """Let the next step copy a cached block to the host tier, if it may; return if it is there.

        Args:
            block_hash: Of a block that is cached here or there.
        """
        host = self._host
        if host is None:
            return False
        if block_hash in host:
            return True
        block = self._block_of.get(block_hash)
        if block is None or self.max_offloads <= 0 or (slot := host.reserve()) is None:
            return False
        self.max_offloads -= 1
        host.commit(slot, block_hash, position=self._position_of[block_hash])
        host.fill(block_hash)
        self._held.append(block_hash)
        self._offloads.append((block, slot))
        return True

    def copy_oldest_to_host(self, num_blocks: int) -> None:
        """Copy what is evicted next and the host tier lacks, as far as the next step may."""
        for block in self._pool.oldest_kept(num_blocks):
            if self.max_offloads <= 0:
                return
            self.copy_to_host(self._hash_of[block])

    def take_moves(self) -> tuple[BlockMoves, list[bytes]]:
        """Return what the next step copies, which has to be the next one, and which blocks.

        The caller gives these to `moves_ended` when the step is over: until then their slots are
        read or written.
        """
        moves = BlockMoves(tuple(self._offloads), tuple(self._restores))
        held, self._held = self._held, []
        self._offloads.clear()
        self._restores.clear()
        return moves, held

    def moves_ended(self, held: Iterable[bytes]) -> None:
        """Let go of the blocks that a step has copied."""
        if self._host is not None:
            for block_hash in held:
                self._host.copied(block_hash)

    def flush(self) -> int:
        """Forget every cached block that nobody references; return how many."""
        blocks = self._pool.free_kept()
        for block in blocks:
            block_hash = self._hash_of.pop(block)
            del self._block_of[block_hash], self._position_of[block_hash]
            self._events.leave(block_hash)
        return len(blocks)

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """Return the hashes added and removed since the last call, in any tier, each in order.

        A hash that came and went in between is in neither: an index that removes and adds these
        equals `hashes()`.
        """
        return self._events.take()

    def hashes(self) -> list[bytes]:
        """Return the hashes of all blocks in any tier, in the order in which they were entered."""
        return self._events.hashes()

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
        assert self._position_of.keys() == self._block_of.keys()
        assert not self._offloads and not self._restores and not self._held, "moves are left over"
        self._events.check_invariants()
        if self._host is not None:
            self._host.check_invariants()
