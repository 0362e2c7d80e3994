"""Sets of replicas, kept once each however many blocks have the very same replicas.

A set is a mask, an int with bit s for the replica in slot s, and known by a small id. Of a million
blocks on a thousand replicas most have one of some thousand sets, so that a block costs a reference
to an id in place of a mask of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

NOBODY = 0
"""Id of the empty set."""

_INT_BYTES = 32  # of an id or a count, as it is allocated
_FIRST_GROWTH_BYTES = 512  # of tables that were empty


class ReplicaSets:
    """The sets that blocks have, each with the number of blocks that have it.

    A set that no block has is forgotten by `forget_unused`, and its id used again.
    """

    def __init__(self) -> None:
        self.masks: list[int] = [0]  # by id; to be read only
        self._num_blocks: list[int] = [0]  # by id; those of NOBODY are not counted
        self._ids: dict[int, int] = {0: NOBODY}  # by mask
        self._free: list[int] = []  # ids
        self._int_bytes = 0  # of masks, ids and counts
        self.num_bytes = self._table_bytes()  # memory that the sets take, bytes

    def growth_bytes(self, mask: int) -> int:
        """Return by how much `num_bytes` can grow when the set is asked for."""
        if mask in self._ids:
            return 0
        # A table that is full doubles; a list grows by less.
        return _FIRST_GROWTH_BYTES + _set_bytes(mask) + self.num_bytes - self._int_bytes

    def id_of(self, mask: int) -> int:
        """Return the id of a set, which is made if it is new."""
        set_id = self._ids.get(mask)
        if set_id is not None:
            return set_id
        if self._free:
            set_id = self._free.pop()
            self.masks[set_id] = mask
        else:
            set_id = len(self.masks)
            self.masks.append(mask)
            self._num_blocks.append(0)
        self._ids[mask] = set_id
        self._int_bytes += _set_bytes(mask)
        self.num_bytes = self._int_bytes + self._table_bytes()
        return set_id

    def move(self, from_id: int, to_id: int, num_blocks: int) -> None:
        """Count so many blocks, which had one set, at another."""
        if from_id != NOBODY:
            self._num_blocks[from_id] -= num_blocks
        if to_id != NOBODY:
            self._num_blocks[to_id] += num_blocks

    def forget_unused(self, set_ids: Iterable[int]) -> None:
        """Forget those of the sets that no block has; not one id may come twice."""
        for set_id in set_ids:
            if set_id != NOBODY and not self._num_blocks[set_id]:
                mask, self.masks[set_id] = self.masks[set_id], 0
                del self._ids[mask]
                self._free.append(set_id)
                self._int_bytes -= _set_bytes(mask)
        self.num_bytes = self._int_bytes + self._table_bytes()

    def check_invariants(self, num_blocks: Sequence[int]) -> None:
        """Assert that the sets are those that blocks have.

        Args:
            num_blocks: Of each id, counted anew.
        """
        assert list(num_blocks) == self._num_blocks
        used = {mask: set_id for set_id, mask in enumerate(self.masks) if num_blocks[set_id]}
        assert self._ids == {0: NOBODY, **used}
        assert self._int_bytes == sum(map(_set_bytes, used))
        assert self.num_bytes == self._int_bytes + self._table_bytes()
        assert len(self._free) == len(self.masks) - len(self._ids)

    def _table_bytes(self) -> int:
        tables = (self.masks, self._num_blocks, self._free, self._ids)
        return sum([table.__sizeof__() for table in tables])


def slots_of(mask: int) -> Iterator[int]:
    """Yield the slots of a set's replicas, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _set_bytes(mask: int) -> int:
    # Integers are allocated in steps of 16 bytes.
    return -(-mask.__sizeof__() // 16) * 16 + 2 * _INT_BYTES
