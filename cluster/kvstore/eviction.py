"""Which block of a cache is given up first: how often it was used, and how long ago.

LFU with dynamic ageing (Arlitt et al., "Evaluating Content Management Techniques for Web Proxy
Caches", 1999; the family of GreedyDual-Size, Cao and Irani, USITS 1997, section 4):

    value = age + uses - depth        age: the value of what was evicted last
                                      depth: 0 ... 1, grows with the place in the chain

What is used often stays. What was used often once is overtaken: each use is worth as much as the
age at its time, and the age grows with every eviction. Of one chain's blocks the tail goes before
the head, without which it could not be found.

    heap   | (value, number, key) ...        entries of older numbers are garbage, skipped by pop
    entry  key -> uses, position, value, number, is_pinned
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

MAX_USES = 16  # counted; more would keep a block for that many turnovers of the cache after its end
HALF_DEPTH_BLOCKS = 256  # position whose depth is 0.5
_MAX_GARBAGE = 64  # entries of the heap beyond twice the live ones

Key = TypeVar("Key", bound=Hashable)


def depth(position: int) -> float:
    """Return what a block's place in its chain takes off its value: 0 up to, never, 1.

    So one more use is worth more than any place.
    """
    return position / (position + HALF_DEPTH_BLOCKS)


@dataclass(slots=True)
class _Entry:
    uses: int
    position: int
    value: float
    number: int  # of the last change: finds this entry's place in the heap, and breaks ties
    is_pinned: bool = False


class EvictionOrder(Generic[Key]):
    """An order of keys by value; of equal ones that which was used least recently goes first.

    Every operation but `hottest` is O(log n), amortized.
    """

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._age = 0.0
        self._number = 0
        self._num_pinned = 0

    def __len__(self) -> int:
        """Return how many keys there are, pinned ones too."""
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        """Return whether a key is there, pinned or not."""
        return key in self._entries

    @property
    def num_pinned(self) -> int:
        """Keys that `pop` spares."""
        return self._num_pinned

    def add(self, key: Key, uses: int = 1, position: int = 0) -> None:
        """Add a key that is not there.

        Args:
            key: Any.
            uses: So far, at least 0; those above `MAX_USES` are not counted.
            position: Place of the block in its chain, at least 0.
        """
        assert key not in self._entries, f"{key!r} is there already"
        self._entries[key] = _Entry(min(uses, MAX_USES), position, 0.0, 0)
        self._revalue(key)

    def use(self, key: Key) -> None:
        """Count one more use.

        Raises:
            KeyError: It is not there.
        """
        entry = self._entries[key]
        entry.uses = min(entry.uses + 1, MAX_USES)
        self._revalue(key)

    def remove(self, key: Key) -> None:
        """Forget a key, pinned or not; the age stays.

        Raises:
            KeyError: It is not there.
        """
        self._num_pinned -= self._entries.pop(key).is_pinned
        self._limit_garbage()

    def pin(self, key: Key) -> None:
        """Spare a key from `pop`; pinned already is fine.

        Raises:
            KeyError: It is not there.
        """
        entry = self._entries[key]
        self._num_pinned += not entry.is_pinned
        entry.is_pinned = True

    def unpin(self, key: Key) -> None:
        """Let a key be popped again, valued as if just used; not pinned is fine.

        Raises:
            KeyError: It is not there.
        """
        entry = self._entries[key]
        if entry.is_pinned:
            entry.is_pinned = False
            self._num_pinned -= 1
            self._revalue(key)

    def is_pinned(self, key: Key) -> bool:
        """Return whether `pop` spares a key.

        Raises:
            KeyError: It is not there.
        """
        return self._entries[key].is_pinned

    def uses(self, key: Key) -> int:
        """Return the counted uses of a key, at most `MAX_USES`.

        Raises:
            KeyError: It is not there.
        """
        return self._entries[key].uses

    def value(self, key: Key) -> float:
        """Return the value of a key.

        Raises:
            KeyError: It is not there.
        """
        return self._entries[key].value

    def pop(self) -> Key:
        """Remove and return the least valuable key that is not pinned; its value is the new age.

        Raises:
            KeyError: There is none.
        """
        while self._heap:
            value, number, key = heapq.heappop(self._heap)
            entry = self._entries.get(key)
            if entry is not None and entry.number == number and not entry.is_pinned:
                del self._entries[key]
                self._age = value
                return key
        raise KeyError("every key is pinned" if self._entries else "no keys")

    def hottest(self, limit: int) -> list[Key]:
        """Return at most `limit` keys: pinned ones, then by value, the highest first."""
        ranked = heapq.nlargest(
            limit,
            self._entries.items(),
            key=lambda item: (item[1].is_pinned, item[1].value, item[1].number),
        )
        return [key for key, _ in ranked]

    def check_invariants(self) -> None:
        """Assert that every key can be popped or is pinned, and that garbage is bounded."""
        live = {(entry.number, key) for key, entry in self._entries.items() if not entry.is_pinned}
        assert live <= {(number, key) for _, number, key in self._heap}
        assert self._num_pinned == len(self._entries) - len(live)
        assert len(self._heap) <= 2 * len(self._entries) + _MAX_GARBAGE

    def _revalue(self, key: Key) -> None:
        entry = self._entries[key]
        self._number += 1
        entry.number = self._number
        entry.value = self._age + entry.uses - depth(entry.position)
        if not entry.is_pinned:
            heapq.heappush(self._heap, (entry.value, entry.number, key))
            self._limit_garbage()

    def _limit_garbage(self) -> None:
        if len(self._heap) > 2 * len(self._entries) + _MAX_GARBAGE:
            self._heap = [
                (entry.value, entry.number, key)
                for key, entry in self._entries.items()
                if not entry.is_pinned
            ]
            heapq.heapify(self._heap)
