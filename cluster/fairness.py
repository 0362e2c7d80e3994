"""Weighted fair shares: who may be served next, so that nobody waits for others' floods.

    counter of a key = tokens served / weight

      least active ──►|◄──── burst ────►|
        a ────────────●                 |          entitled
        b ────────────────────●         |          entitled
        c ──────────────────────────────────●      waits until the least has caught up
        d ─────●                        |          idle: lifted to the least when it comes back

Source: Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), the virtual token
counter; `burst` lets other orders, such as due times, choose among those who are nearly equal.
"""

from __future__ import annotations

import heapq
import math
from typing import Any, Generic, Protocol, TypeVar

_UNITS_PER_TOKEN = 2**32  # counters are integers: sums are exact however much was served
_MAX_IDLE_KEYS = 4096


class _Orderable(Protocol):
    def __lt__(self, other: Any, /) -> bool: ...
    def __hash__(self) -> int: ...


K = TypeVar("K", bound=_Orderable)


class FairShare(Generic[K]):
    """Counts what each key was served and says whose turn it is; pure and deterministic.

    Two keys that are active all the time, and are served only while they are entitled, differ in
    tokens / weight by at most `burst` and the largest single charge / weight.

    Args:
        burst: Tokens / weight that a key may be ahead of the least active one, >= 0.
        max_idle_keys: Remembered for what they had before others. Beyond it those that are least
            ahead are forgotten, as if they had been served no more than the least active one.
    """

    def __init__(self, burst: float, *, max_idle_keys: int = _MAX_IDLE_KEYS) -> None:
        assert math.isfinite(burst) and burst >= 0, f"{burst=}"
        assert max_idle_keys >= 1, f"{max_idle_keys=}"
        self._burst = round(burst * _UNITS_PER_TOKEN)
        self._max_idle_keys = max_idle_keys
        self._active: dict[K, int] = {}  # counters of keys that have something waiting
        self._idle: dict[K, int] = {}  # counters of others
        self._level = 0  # where a key starts when nobody is active; never falls

    def charge(self, key: K, num_tokens: float, weight: float) -> None:
        """Note that a key is served.

        Args:
            key: Active or not.
            num_tokens: >= 0.
            weight: Of the key, > 0: twice the weight is charged half as much.
        """
        assert math.isfinite(num_tokens) and num_tokens >= 0, f"{num_tokens=}"
        assert math.isfinite(weight) and weight > 0, f"{weight=}"
        amount = round(num_tokens / weight * _UNITS_PER_TOKEN)
        if key in self._active:
            self._active[key] += amount
        else:
            self._put_idle(key, self._lifted(key) + amount)

    def arrive(self, key: K) -> None:
        """Note that something of a key waits; it starts no lower than those that wait already."""
        if key not in self._active:
            counter = self._lifted(key)
            self._idle.pop(key, None)
            self._active[key] = counter

    def leave(self, key: K) -> None:
        """Note that nothing of a key waits any more; fine if nothing did."""
        counter = self._active.pop(key, None)
        if counter is None:
            return
        if not self._active:
            self._level = counter
        self._put_idle(key, counter)

    def entitled(self) -> tuple[K, ...]:
        """Return the active keys that may be served now, the one with the least first."""
        limit = self._floor() + self._burst
        found = [(counter, key) for key, counter in self._active.items() if counter <= limit]
        return tuple(key for _, key in sorted(found))

    def lead(self, key: K) -> float:
        """Return how far a key is ahead of the least active one, tokens / weight, >= 0."""
        counter = self._active.get(key)
        if counter is None:
            counter = self._lifted(key)
        return (counter - self._floor()) / _UNITS_PER_TOKEN

    def leads(self) -> dict[K, float]:
        """Return `lead` of each active key."""
        floor = self._floor()
        return {key: (c - floor) / _UNITS_PER_TOKEN for key, c in self._active.items()}

    def check_invariants(self) -> None:
        """Assert that each key is in one place, none too low, and that few are idle."""
        assert not self._active.keys() & self._idle.keys()
        assert all(counter >= self._level for counter in self._active.values())
        assert len(self._idle) <= self._max_idle_keys

    def _floor(self) -> int:
        return min(self._active.values(), default=self._level)

    def _lifted(self, key: K) -> int:
        """Return the counter with which an idle key comes back: idleness has saved up nothing."""
        return max(self._idle.get(key, 0), self._floor())

    def _put_idle(self, key: K, counter: int) -> None:
        if counter <= self._floor():
            self._idle.pop(key, None)  # it would be lifted anyway
            return
        self._idle[key] = counter
        if len(self._idle) > self._max_idle_keys:
            # Half at a time: the search is paid by as many calls as it forgets keys.
            ahead = heapq.nlargest(
                (self._max_idle_keys + 1) // 2,
                ((counter, key) for key, counter in self._idle.items()),
            )
            self._idle = {key: counter for counter, key in ahead}
