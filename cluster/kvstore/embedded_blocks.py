"""KV blocks in the memory of one process: the one-machine default, and the model of a right store.

    blocks   key -> payload
    order    EvictionOrder: who makes room first
    ends     | k7 12.5 s | k2 13.0 s | ...        when each expires, in order
    pins     | k2 11.0 s | ...                    when pins end, in order: a pin is a lease

It answers at once and never raises `UnavailableError`: `embedded_actor.py` puts it into a process
of its own, where a deadline has a meaning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from cluster.clock import Clock
from cluster.config import StoreConfig
from cluster.kvstore.block_store import BlockStoreStats, Buffer, FetchedBlocks, nbytes
from cluster.kvstore.budget import block_cost
from cluster.kvstore.eviction import EvictionOrder

_MAX_ENDED_PINS = 1024  # that one call looks at


@dataclass(frozen=True, slots=True)
class _Place:
    uses: int
    position: int  # in its chain
    is_pinned: bool


class EmbeddedBlocks:
    """The `BlockStore` protocol on plain dictionaries.

    Args:
        config: TTL and budget of blocks.
        clock: For the TTL.
    """

    def __init__(self, config: StoreConfig, clock: Clock) -> None:
        self._max_bytes = config.max_bytes
        self._ttl_s = config.kv_ttl_s
        self._clock = clock
        self._forget_all()

    async def put_blocks(
        self, blocks: Mapping[bytes, Buffer], *, pinned: bool = False, position: int = 0
    ) -> list[bool]:
        """Write a chain's blocks, first one first; return which are stored now.

        Args:
            blocks: By key.
            pinned: Spare them, as long as these are at most half of the budget.
            position: Place of the first one in its chain.
        """
        self._end_old()
        before = {key: self._take(key) for key in blocks}
        added: dict[bytes, _Place] = {}
        added_bytes = 0
        for position_of_key, (key, payload) in enumerate(blocks.items(), position):
            cost = block_cost(nbytes(payload))
            if cost > self._max_bytes - self._pinned_bytes - added_bytes:
                self._pins.pop(key, None)
                continue
            self._make_room(cost)
            pins = (pinned or key in self._pins) and self._may_pin(cost)
            if pins:
                self._pinned_bytes += cost
            else:
                self._pins.pop(key, None)
                added_bytes += cost
            self._used_bytes += cost
            self._blocks[key] = bytes(payload)
            added[key] = _Place(before[key] + 1, position_of_key, pins)
        # At the end only: the room that a block needs comes from others than this call's.
        for key, place in added.items():
            self._order.add(key, place.uses, place.position)
            self._renew(key)
            if place.is_pinned:
                self._order.pin(key)
            if place.is_pinned and pinned:
                self._renew_pin(key)
        return [key in added for key in blocks]

    async def get_blocks(self, keys: Sequence[bytes]) -> FetchedBlocks:
        """Return the bytes of each block, bit-exact, and count this as a use of those found."""
        self._end_old()
        for key in dict.fromkeys(keys):
            self._use(key)
        return FetchedBlocks([self._blocks.get(key) for key in keys])

    async def has_blocks(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks are present; no use is counted."""
        self._end_old()
        return [key in self._blocks for key in keys]

    async def touch_blocks(self, keys: Sequence[bytes], *, pinned: bool = False) -> list[bool]:
        """Return which blocks are present, and count a use of them: value and TTL are renewed."""
        self._end_old()
        for key in dict.fromkeys(keys):
            self._use(key)
            if pinned and key in self._blocks:
                self._pin(key)
        return [key in self._blocks for key in keys]

    async def unpin_blocks(self, keys: Sequence[bytes]) -> None:
        """Let blocks be evicted again, as if just used; absent ones are fine."""
        self._end_old()
        for key in keys:
            if key in self._pins:
                self._unpin(key)
                self._renew(key)

    async def hottest(self, prefix: bytes, limit: int) -> list[bytes]:
        """Return at most `limit` keys that begin with `prefix`: pinned ones, then by value."""
        self._end_old()
        ranked = self._order.hottest(len(self._order))
        return [key for key in ranked if key.startswith(prefix)][:limit]

    async def flush(self) -> int:
        """Forget every block; return how many."""
        self._end_old()
        num_blocks = len(self._blocks)
        self._forget_all()
        return num_blocks

    async def stats(self) -> BlockStoreStats:
        """Return the books."""
        self._end_old()
        return BlockStoreStats(
            self._used_bytes,
            self._max_bytes,
            len(self._blocks),
            self._order.num_pinned,
            self._num_evicted,
        )

    async def ping(self) -> None:
        """Return."""

    async def close(self) -> None:
        """Do nothing: there is no connection."""

    def check_invariants(self) -> None:
        """Assert that the books are what is stored, and within the budget."""
        self._order.check_invariants()
        assert self._used_bytes == sum(map(self._cost, self._blocks)) <= self._max_bytes
        pinned = [key for key in self._blocks if self._order.is_pinned(key)]
        assert self._pinned_bytes == sum(map(self._cost, pinned)) <= self._max_bytes // 2
        assert len(self._order) == len(self._blocks)
        assert set(self._ends) == set(self._blocks)
        assert set(self._pins) == set(pinned)
        for ends in (self._ends, self._pins):
            assert list(ends.values()) == sorted(ends.values())

    def _forget_all(self) -> None:
        self._blocks: dict[bytes, bytes] = {}
        self._order: EvictionOrder[bytes] = EvictionOrder()
        self._ends: OrderedDict[bytes, float] = OrderedDict()
        self._pins: OrderedDict[bytes, float] = OrderedDict()
        self._used_bytes = 0
        self._pinned_bytes = 0
        self._num_evicted = 0

    def _cost(self, key: bytes) -> int:
        return block_cost(len(self._blocks[key]))

    def _end_old(self) -> None:
        now_s = self._clock.now()
        while self._ends and next(iter(self._ends.values())) <= now_s:
            key = next(iter(self._ends))
            self._take(key)
            self._pins.pop(key, None)
        for key in list(islice(self._pins, _MAX_ENDED_PINS)):
            if self._pins[key] > now_s:
                break
            self._unpin(key)

    def _take(self, key: bytes) -> int:
        """Remove a block if it is there, but not the end of its pin; return its uses."""
        if key not in self._blocks:
            return 0
        if key in self._pins:
            self._pinned_bytes -= self._cost(key)
        uses = self._order.uses(key)
        self._order.remove(key)
        self._drop(key)
        return uses

    def _make_room(self, cost: int) -> None:
        while self._used_bytes + cost > self._max_bytes:
            self._drop(self._order.pop())
            self._num_evicted += 1

    def _may_pin(self, cost: int) -> bool:
        return 2 * (self._pinned_bytes + cost) <= self._max_bytes

    def _drop(self, key: bytes) -> None:
        """Forget a block that is not in the order any more."""
        self._used_bytes -= self._cost(key)
        del self._ends[key]
        del self._blocks[key]

    def _renew(self, key: bytes) -> None:
        self._ends[key] = self._clock.now() + self._ttl_s
        self._ends.move_to_end(key)

    def _use(self, key: bytes) -> None:
        if key in self._blocks:
            self._order.use(key)
            self._renew(key)

    def _pin(self, key: bytes) -> None:
        cost = self._cost(key)
        if key not in self._pins:
            if not self._may_pin(cost):
                return
            self._order.pin(key)
            self._pinned_bytes += cost
        self._renew_pin(key)

    def _renew_pin(self, key: bytes) -> None:
        self._pins[key] = self._clock.now() + self._ttl_s
        self._pins.move_to_end(key)

    def _unpin(self, key: bytes) -> None:
        self._order.unpin(key)
        self._pinned_bytes -= self._cost(key)
        del self._pins[key]
