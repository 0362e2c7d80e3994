"""Which replica holds which cached block: subscribed from the leaders, never stored.

A block is known by its router key, 64 bit of its place in the chain of block hashes, so that equal
keys mean equal prefixes and the longest cached prefix is the longest run of known keys.

    key  ──► shard ──► id of a set of replicas ──► its mask: bit s for the replica in slot s

Whoever holds a block of a chain holds those before it: replicas evict a chain from its end. So the
prompt's keys are searched by halves, and only where the masks at both ends differ; looking a key up
costs more than anything else here. Where a lower tier has lost a block in the middle, a replica is
believed to hold it.

A replica that goes, or comes anew, leaves its slot dead: masked away at once, swept from the masks
by later calls, a bounded number of keys each. The slot is used again once no mask has its bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.router.replica_sets import NOBODY, ReplicaSets, slots_of

_KEY_BYTES = 48  # an int of 64 bit, as it is allocated
_MIN_SHARDS = 64
_SHARD_BYTES = 2**22  # of the budget, at most: growing a shard of so many takes 2 ms
_FIRST_TABLE_BYTES = 256  # of a shard with its first key
_MAX_TABLE_BYTES_PER_KEY = 256  # 27 to 108 where keys come and go evenly
_SWEPT_KEYS = 1024  # by one call
_FEW_SLOTS = 12  # of a mask: taken one by one they cost less than an array's operations


class PrefixIndex:
    """The cached blocks of every connected replica.

    Args:
        max_bytes: Of memory, at least 64 KiB. A block that does not fit is not indexed, and the
            newest is the one that does not fit: leaders announce a chain from its head on, and
            what follows a missing block is worth nothing, what precedes it is.
    """

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        assert max_bytes >= 2**16, f"{max_bytes=}"
        num_shards = max(_MIN_SHARDS, 1 << (max_bytes // _SHARD_BYTES - 1).bit_length())
        self._max_bytes = max_bytes
        self._shards: list[dict[int, int]] = [{} for _ in range(num_shards)]  # key -> set's id
        self._last_shard = num_shards - 1
        self._block_bytes = num_shards * (8 + {}.__sizeof__())  # of the shards and their keys
        self._sets = ReplicaSets()
        self._slots: dict[str, int] = {}
        self._num_blocks: list[int] = []  # by slot: keys whose mask has its bit
        self._live = 0  # mask of the slots of connected replicas
        self._dead = 0  # mask of the slots that are not, and have blocks still
        self._swept_shard = 0
        self._unswept: list[int] = []  # keys of that shard, or what is left of them
        self.num_dropped = 0  # blocks that were not indexed for lack of room, since start

    @property
    def num_bytes(self) -> int:
        """Memory that the index takes, bytes; keys count as the largest they can be."""
        return self._block_bytes + self._sets.num_bytes

    @property
    def num_keys(self) -> int:
        """Different blocks that are known."""
        return sum(map(len, self._shards))

    @property
    def num_slots(self) -> int:
        """Length of what `match` returns: the slots in use, and those between them."""
        return len(self._num_blocks)

    @property
    def num_dead_slots(self) -> int:
        """Slots of replicas that are gone, whose blocks are not swept yet."""
        return self._dead.bit_count()

    def slot_of(self, replica_id: str) -> int:
        """Return the slot of a replica, until it is replaced or dropped; -1: unknown."""
        return self._slots.get(replica_id, -1)

    def num_blocks(self, replica_id: str) -> int:
        """Return how many blocks of a replica are known; 0 for an unknown replica."""
        slot = self._slots.get(replica_id)
        return 0 if slot is None else self._num_blocks[slot]

    def replace(self, replica_id: str, keys: Iterable[int]) -> None:
        """Take a snapshot: whatever was known of the replica before is forgotten.

        Args:
            replica_id: Of the replica; it gets another slot.
            keys: Its blocks, those of a chain in order.
        """
        self.drop(replica_id)
        slot = self._slots[replica_id] = self._free_slot()
        self._live |= 1 << slot
        self._put(keys, self._live, 1 << slot)

    def apply(self, replica_id: str, *, added: Iterable[int], removed: Iterable[int]) -> None:
        """Take a delta, which follows a snapshot; removals happen before additions."""
        bit = 1 << self._slots[replica_id]
        self._put(removed, self._live & ~bit, 0)
        self._put(added, self._live, bit)
        self._sweep()

    def drop(self, replica_id: str) -> None:
        """Forget a replica; unknown already is fine."""
        slot = self._slots.pop(replica_id, None)
        if slot is not None:
            self._live &= ~(1 << slot)
            if self._num_blocks[slot]:
                self._dead |= 1 << slot
        self._sweep()

    def match(self, keys: Sequence[int]) -> NDArray[np.int32]:
        """Return how many leading blocks of a prompt each slot's replica holds, [num_slots]."""
        if not keys:
            return np.zeros(self.num_slots, np.int32)
        end = len(keys)
        # Who holds the block before index i, and all before that: of the intervals still searched.
        first, last = self._holders(keys[0]), self._holders(keys[-1])
        losses: list[tuple[int, int]] = []  # who holds no more blocks than so many
        intervals = [(0, end - 1, first, first & last)]
        while intervals:
            low, high, holders, remaining = intervals.pop()
            if holders == remaining:
                continue
            if high == low + 1:
                losses.append((holders ^ remaining, high))
                continue
            middle = (low + high) // 2
            between = (self._holders(keys[middle]) & holders) | remaining
            intervals += ((low, middle, holders, between), (middle, high, between, remaining))
        losses.append((first & last, end))
        return self._lengths(losses)

    def _holders(self, key: int) -> int:
        """Return the mask of the connected replicas that hold a block."""
        set_id = self._shards[key & self._last_shard].get(key, NOBODY)
        return self._live & self._sets.masks[set_id]

    def longest_prefix(self, replica_id: str, keys: Sequence[int]) -> int:
        """Return how many leading blocks of a prompt the replica holds."""
        slot = self._slots.get(replica_id)
        return 0 if slot is None else int(self.match(keys)[slot])

    def check_invariants(self) -> None:
        """Assert that counts and sizes are those of what is there."""
        users = [0] * len(self._sets.masks)
        num_blocks = [0] * self.num_slots
        for shard in self._shards:
            for set_id in shard.values():
                users[set_id] += 1
                for slot in slots_of(self._sets.masks[set_id]):
                    num_blocks[slot] += 1
        self._sets.check_invariants(users)
        assert num_blocks == self._num_blocks
        table_bytes = sum(8 + shard.__sizeof__() for shard in self._shards)
        assert table_bytes + _KEY_BYTES * self.num_keys == self._block_bytes
        assert self.num_bytes <= self._max_bytes
        clean = [slot for slot, count in enumerate(num_blocks) if not count]
        assert not any(self._dead >> slot & 1 for slot in clean) and not self._dead & self._live

    def _lengths(self, losses: list[tuple[int, int]]) -> NDArray[np.int32]:
        """Return by slot how many blocks a replica holds, of masks of those who hold so many."""
        lengths = np.zeros(self.num_slots, np.int32)
        for mask, length in losses:
            if not length:
                continue
            if mask.bit_count() <= _FEW_SLOTS:
                for slot in slots_of(mask):
                    lengths[slot] = length
            else:
                packed = np.frombuffer(mask.to_bytes(self.num_slots // 8 + 1, "little"), np.uint8)
                lengths[np.flatnonzero(np.unpackbits(packed, bitorder="little"))] = length
        return lengths

    def _free_slot(self) -> int:
        """Return the lowest slot without replica and blocks: low slots keep the masks short."""
        for slot, num_blocks in enumerate(self._num_blocks):
            if not num_blocks and not self._live >> slot & 1:
                return slot
        self._num_blocks.append(0)
        return self.num_slots - 1

    def _put(self, keys: Iterable[int], kept: int, added: int) -> None:
        """Give every key those of its replicas that are `kept`, and those that are `added`."""
        shards, last_shard, block_bytes = self._shards, self._last_shard, self._block_bytes
        moves: dict[int, list[int]] = {}  # by id of the set before: the one after, how many keys
        last_id = -1
        for key in keys:
            shard = shards[key & last_shard]
            old_id = shard.get(key, NOBODY)
            if old_id != last_id:  # along a chain the set seldom changes
                last_id, most_bytes = old_id, self._max_bytes - self._sets.num_bytes
                if old_id not in moves:
                    room_bytes = most_bytes - block_bytes
                    moves[old_id] = [self._set_after(old_id, kept, added, room_bytes), 0]
                    most_bytes = self._max_bytes - self._sets.num_bytes
                move = moves[old_id]
                new_id = move[0]
            if new_id == old_id:
                pass
            elif new_id == NOBODY:
                del shard[key]
                block_bytes -= _KEY_BYTES
            elif old_id != NOBODY:
                shard[key] = new_id
            else:
                table_bytes = shard.__sizeof__()
                # A table that is full doubles.
                if block_bytes + _FIRST_TABLE_BYTES + table_bytes > most_bytes:
                    self.num_dropped += 1
                    continue
                shard[key] = new_id
                block_bytes += _KEY_BYTES + shard.__sizeof__() - table_bytes
            move[1] += 1
        self._block_bytes = block_bytes
        self._settle(moves, kept, added)

    def _set_after(self, old_id: int, kept: int, added: int, room_bytes: int) -> int:
        old = self._sets.masks[old_id]
        mask = old & kept | added
        if mask == old:
            return old_id
        if self._sets.growth_bytes(mask) <= room_bytes:
            return self._sets.id_of(mask)
        # What cannot be added is not; what cannot be told apart is forgotten as a whole.
        return old_id if added else NOBODY

    def _settle(self, moves: dict[int, list[int]], kept: int, added: int) -> None:
        """Count what has moved from set to set, by set and by slot."""
        masks = self._sets.masks
        touched: dict[int, None] = {}
        for old_id, (new_id, num_keys) in moves.items():
            old, new = masks[old_id], masks[new_id]
            if old_id == new_id and not added & ~old:
                continue
            touched[old_id] = touched[new_id] = None
            missing = (old & kept | added) & ~new
            self.num_dropped += num_keys * missing.bit_count()
            self._sets.move(old_id, new_id, num_keys)
            for slot in slots_of(new & ~old):
                self._num_blocks[slot] += num_keys
            for slot in slots_of(old & ~new):
                self._num_blocks[slot] -= num_keys
                if not self._num_blocks[slot]:
                    self._dead &= ~(1 << slot)
        self._sets.forget_unused(touched)

    def _sweep(self) -> None:
        """Clear the bits of dead slots from the next few keys."""
        room = _SWEPT_KEYS
        for _ in self._shards:
            if not self._dead or not room:
                return
            if not self._unswept:
                self._unswept = list(self._shards[self._swept_shard])
            keys = self._unswept[-room:]
            del self._unswept[-room:]
            room -= len(keys)
            self._put(keys, self._live, 0)
            if not self._unswept or not self._dead:
                self._unswept.clear()
                self._compact(self._swept_shard)
                self._swept_shard = (self._swept_shard + 1) & self._last_shard

    def _compact(self, index: int) -> None:
        """Give back the room that a shard keeps for keys that are gone."""
        shard = self._shards[index]
        table_bytes = shard.__sizeof__()
        if table_bytes > _MAX_TABLE_BYTES_PER_KEY * (1 + len(shard)):
            self._shards[index] = shard = shard.copy()
            self._block_bytes += shard.__sizeof__() - table_bytes
