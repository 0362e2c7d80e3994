"""Which blocks are in the host tier: numbered slots of host memory, the same on every worker.

    free ──reserve──► reserved ──commit(hash)──► kept ──least valuable, nobody holds it──► reserved
      ▲                  │                        │ ▲
      └─────cancel───────┘                    hold│ │release
                                                  ▼ │
                                                  held

A slot is held while something outside reads it: a move to the store, a restore of the next step.
What is kept is also what waits to be written to the store, and where fetched blocks arrive.
"""

from __future__ import annotations

from cluster.engine.block_events import BlockEvents
from cluster.engine.use_counter import UseCounter
from cluster.kvstore.eviction import EvictionOrder


class HostTier:
    """The slots of one replica.

    Args:
        num_slots: Of every worker; 0 keeps nothing.
        events: Hears of what comes and goes.
        uses: Of blocks so far, in whatever tier they were; None counts anew.
    """

    def __init__(self, num_slots: int, events: BlockEvents, uses: UseCounter | None = None) -> None:
        self.num_slots = num_slots
        self.uses = uses or UseCounter(max(1, 4 * num_slots))
        self.num_evictions = 0
        self._events = events
        self._free = list(reversed(range(num_slots)))
        self._slot_of: dict[bytes, int] = {}
        self._order: EvictionOrder[bytes] = EvictionOrder()
        self._num_holds: dict[bytes, int] = {}
        self._num_reserved = 0
        self._filling: set[bytes] = set()  # their bytes come with a step that is under way

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slot_of

    @property
    def num_blocks(self) -> int:
        """Blocks that are kept."""
        return len(self._slot_of)

    @property
    def num_available(self) -> int:
        """Slots that `reserve` can give."""
        return len(self._free) + len(self._slot_of) - len(self._num_holds)

    def slot_of(self, block_hash: bytes) -> int:
        """Return the slot of a block that is kept."""
        return self._slot_of[block_hash]

    def use(self, block_hash: bytes) -> None:
        """Count a use of a block; one that is not kept is fine."""
        if block_hash in self._slot_of:
            self._order.use(block_hash)

    def hold(self, block_hash: bytes) -> int:
        """Keep a block from eviction until `release`; return its slot."""
        num_holds = self._num_holds.get(block_hash, 0)
        if num_holds == 0:
            self._order.pin(block_hash)
        self._num_holds[block_hash] = num_holds + 1
        return self._slot_of[block_hash]

    def release(self, block_hash: bytes) -> None:
        """Take back one `hold`."""
        num_holds = self._num_holds[block_hash] - 1
        if num_holds:
            self._num_holds[block_hash] = num_holds
            return
        del self._num_holds[block_hash]
        self._order.unpin(block_hash)

    def reserve(self) -> int | None:
        """Return a slot to fill, for which the least valuable block may go; None: all are held."""
        if self._free:
            slot = self._free.pop()
        elif len(self._slot_of) > len(self._num_holds):
            evicted = self._order.pop()
            slot = self._slot_of.pop(evicted)
            self._events.leave(evicted)
            self.num_evictions += 1
        else:
            return None
        self._num_reserved += 1
        return slot

    def cancel(self, slot: int) -> None:
        """Give a reserved slot back unfilled."""
        self._num_reserved -= 1
        self._free.append(slot)

    def commit(self, slot: int, block_hash: bytes, *, position: int = 0) -> bool:
        """Keep what a reserved slot holds; return False, and give the slot back, if it is known.

        Args:
            slot: From `reserve`.
            block_hash: Of what is in it.
            position: In its chain: of equal ones the last goes first, which nobody could find
                without the first.
        """
        if block_hash in self._slot_of:
            self.cancel(slot)
            return False
        self._num_reserved -= 1
        self._slot_of[block_hash] = slot
        self._order.add(block_hash, max(1, self.uses.uses(block_hash)), position)
        self._events.enter(block_hash)
        return True

    def fill(self, block_hash: bytes) -> None:
        """Hold a block whose bytes a step copies to its slot, until `copied`."""
        self.hold(block_hash)
        self._filling.add(block_hash)

    def copied(self, block_hash: bytes) -> None:
        """Take back one `hold` or `fill`: the step that copies from or to the slot is over."""
        self._filling.discard(block_hash)
        self.release(block_hash)

    def is_filled(self, block_hash: bytes) -> bool:
        """Return whether a kept block's bytes are in its slot already."""
        return block_hash not in self._filling

    def some_filled(self) -> bytes | None:
        """Return some block whose bytes are here; None if there is none."""
        return next(filter(self.is_filled, self._slot_of), None)

    def clear(self) -> int:
        """Forget every block that nobody holds; return how many."""
        gone = [block_hash for block_hash in self._slot_of if block_hash not in self._num_holds]
        for block_hash in gone:
            self._order.remove(block_hash)
            self._free.append(self._slot_of.pop(block_hash))
            self._events.leave(block_hash)
        return len(gone)

    def check_invariants(self) -> None:
        """Assert that every slot is free, reserved or kept, and once."""
        kept = list(self._slot_of.values())
        assert len(set(kept)) == len(kept) and len(set(self._free)) == len(self._free)
        assert not set(kept) & set(self._free)
        assert len(kept) + len(self._free) + self._num_reserved == self.num_slots, "a slot is lost"
        assert self._num_holds.keys() <= self._slot_of.keys(), "what is held is gone"
        assert self._filling <= self._num_holds.keys()
        assert len(self._order) == len(kept)
