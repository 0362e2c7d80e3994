"""Journals in the memory of one process, within a byte budget.

    ended   | j3 | j9 |          who makes room, from the left: first those that have ended,
    live    | j1 | j8 | j4 |     then the others; each in the order of the last touch

A write and a claim touch a journal and renew its TTL, so each order is that of expiry, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from cluster.clock import Clock
from cluster.config import StoreConfig
from cluster.kvstore.budget import JOURNAL_OVERHEAD_BYTES, entries_cost
from cluster.kvstore.store import Journal, JournalOutcome, JournalWrite, JournalWrites

MAX_SWEPT = 64
"""Expired journals of either order that one write lets go: more than it can add."""


@dataclass(slots=True)
class _Kept:
    scope: str
    owner: str
    is_ended: bool = False
    entries: list[bytes] = field(default_factory=list)
    cost_bytes: int = JOURNAL_OVERHEAD_BYTES  # as it counts in the budget
    expires_s: float = 0.0


class EmbeddedJournals:
    """Journals on plain dictionaries; see the `Store` protocol for what its calls mean.

    Args:
        config: TTL and budget.
        clock: For the TTL.
    """

    def __init__(self, config: StoreConfig, clock: Clock) -> None:
        self._max_bytes = config.journal_bytes
        self._ttl_s = config.journal_ttl_s
        self._clock = clock
        self._ended: OrderedDict[str, _Kept] = OrderedDict()
        self._live: OrderedDict[str, _Kept] = OrderedDict()
        self._used_bytes = 0
        self._num_dropped_finished = 0
        self._num_dropped_live = 0

    def write(self, writes: Sequence[JournalWrite]) -> JournalWrites:
        """Append to journals, in order; renew the TTL of those written."""
        finished_before, live_before = self._num_dropped_finished, self._num_dropped_live
        outcomes = [self._write(write) for write in writes]
        return JournalWrites(
            outcomes,
            self._num_dropped_finished - finished_before,
            self._num_dropped_live - live_before,
        )

    def read(self, key: str) -> Journal | None:
        """Return a journal of any scope; None where there is none."""
        kept = self._find(key)
        if kept is None:
            return None
        return Journal(kept.scope, kept.owner, list(kept.entries), kept.is_ended)

    def claim(self, key: str, scope: str, owner: str) -> Journal | None:
        """Make `owner` the one who writes, if there is a journal of this scope; renew its TTL."""
        kept = self._find(key)
        if kept is not None and kept.scope == scope:
            kept.owner = owner
            self._touch(key, kept)
        return self.read(key)

    def check_invariants(self) -> None:
        """Assert that the books are what is kept, and within the budget."""
        assert not self._ended.keys() & self._live.keys()
        for order, is_ended in ((self._ended, True), (self._live, False)):
            ends = [kept.expires_s for kept in order.values()]
            assert ends == sorted(ends)
            for kept in order.values():
                assert kept.is_ended == is_ended
                assert kept.cost_bytes == JOURNAL_OVERHEAD_BYTES + entries_cost(kept.entries)
        costs = [kept.cost_bytes for kept in (*self._ended.values(), *self._live.values())]
        assert self._used_bytes == sum(costs) <= self._max_bytes

    def _write(self, write: JournalWrite) -> JournalOutcome:
        assert write.key, "a journal has a key"
        self._sweep()
        known = self._find(write.key)
        is_repeated = bool(known and known.entries[:1] == list(write.entries[:1]) != [])
        begins = write.begins and not is_repeated
        refusal = _refusal(write, known, begins=begins)
        if refusal is not None:
            return refusal
        kept = _Kept(write.scope, write.owner) if begins or known is None else known
        cost_bytes = kept.cost_bytes + entries_cost(write.entries)
        if cost_bytes > self._max_bytes:
            return JournalOutcome.FULL
        self._forget(write.key)
        self._make_room(cost_bytes)
        kept.entries += write.entries
        kept.cost_bytes = cost_bytes
        kept.is_ended |= write.ends
        self._used_bytes += cost_bytes
        self._touch(write.key, kept)
        return JournalOutcome.WRITTEN

    def _find(self, key: str) -> _Kept | None:
        kept = self._live.get(key) or self._ended.get(key)
        return kept if kept is not None and kept.expires_s > self._clock.now() else None

    def _touch(self, key: str, kept: _Kept) -> None:
        order = self._ended if kept.is_ended else self._live
        order[key] = kept
        order.move_to_end(key)
        kept.expires_s = self._clock.now() + self._ttl_s

    def _forget(self, key: str) -> None:
        for order in (self._ended, self._live):
            kept = order.pop(key, None)
            if kept is not None:
                self._used_bytes -= kept.cost_bytes

    def _make_room(self, cost_bytes: int) -> None:
        while self._used_bytes + cost_bytes > self._max_bytes:
            is_ended = bool(self._ended)
            victim = next(iter(self._ended if is_ended else self._live))
            if self._find(victim) is not None:  # what has expired is not dropped
                self._num_dropped_finished += is_ended
                self._num_dropped_live += not is_ended
            self._forget(victim)

    def _sweep(self) -> None:
        now_s = self._clock.now()
        for order in (self._ended, self._live):
            for key in list(islice(order, MAX_SWEPT)):
                if order[key].expires_s > now_s:
                    break
                self._forget(key)


def _refusal(write: JournalWrite, known: _Kept | None, *, begins: bool) -> JournalOutcome | None:
    """Return why a write may not happen, whatever its size; None where it may."""
    if known is not None and known.scope != write.scope:
        return JournalOutcome.FOREIGN
    if begins:
        return None
    if known is None:
        return JournalOutcome.GONE
    return JournalOutcome.LOST if known.owner != write.owner else None
