"""Leases, counters, journals and records in the memory of one process: the one-machine default.

    journals   order of the last append    | j3 | j1 | j8 |          dropped from the left

It answers at once and never raises `UnavailableError`: `embedded_actor.py` puts it into a process
of its own, where a deadline has a meaning. It is the model of a right store, too.
"""

from __future__ import annotations

import heapq
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.clock import Clock
from cluster.config import StoreConfig
from cluster.errors import OverloadedError
from cluster.kvstore.store import (
    MAX_COUNT,
    MAX_RECORDS,
    Records,
    check_record,
    too_many_records,
)

MAX_JOURNAL_BYTES = 64 * 2**20
MAX_COUNTERS = 2**17
_ENTRY_OVERHEAD_BYTES = 64


@dataclass(frozen=True, slots=True)
class _Expiring:
    value: bytes
    expires_s: float


@dataclass(slots=True)
class _Journal:
    expires_s: float
    entries: list[bytes] = field(default_factory=list)
    num_bytes: int = 0


class EmbeddedStore:
    """The `Store` protocol on plain dictionaries.

    Args:
        config: TTL of journals.
        clock: For the TTLs.
        max_journal_bytes: Budget of all journals; the longest untouched ones make room.
    """

    def __init__(
        self, config: StoreConfig, clock: Clock, max_journal_bytes: int = MAX_JOURNAL_BYTES
    ) -> None:
        self._config = config
        self._clock = clock
        self._max_journal_bytes = max_journal_bytes
        self._leases: dict[str, dict[str, _Expiring]] = {}
        self._counters: dict[str, int] = {}  # sums
        self._counter_ends: list[tuple[float, str]] = []  # a heap of when each counter expires
        self._records: dict[str, dict[str, bytes]] = {}
        self._born = uuid.uuid4().hex  # no version of another life of this store is like ours
        self._num_changes: dict[str, int] = {}
        self._journals: OrderedDict[str, _Journal] = OrderedDict()
        self._journal_bytes = 0

    async def put_lease(self, kind: str, key: str, value: bytes, ttl_s: float) -> None:
        """Make `key` present for `ttl_s` seconds, with `value`; renews and replaces."""
        leases = self._live_leases(kind)
        leases[key] = _Expiring(value, self._clock.now() + ttl_s)
        self._leases[kind] = leases

    async def drop_lease(self, kind: str, key: str) -> None:
        """Make `key` absent now; absent already is fine."""
        self._leases.get(kind, {}).pop(key, None)

    async def list_leases(self, kind: str) -> dict[str, bytes]:
        """Return the live leases of a kind, ordered by key."""
        return {key: lease.value for key, lease in sorted(self._live_leases(kind).items())}

    async def count(
        self, key: str, amount: int, ttl_s: float, *, at_most: int | None = None
    ) -> int:
        """Add to a counter, which is 0 at first; return the sum, the amount included.

        Raises:
            OverloadedError: There are too many counters.
        """
        counted = self._live_counter(key)
        total = amount + (counted or 0)
        assert abs(total) <= MAX_COUNT, f"{key=} {total=}"
        if amount == 0 or (at_most is not None and total > at_most):
            return total
        if counted is None:
            if len(self._counters) >= MAX_COUNTERS:
                raise OverloadedError(
                    f"{MAX_COUNTERS} counters, limit={MAX_COUNTERS}: use fewer, or a Redis"
                )
            heapq.heappush(self._counter_ends, (self._clock.now() + ttl_s, key))
        self._counters[key] = total
        return total

    async def put_record(
        self, kind: str, key: str, value: bytes, *, if_absent: bool = False
    ) -> bool:
        """Keep `value` under `key` until it is dropped; return whether it is the one kept now.

        Raises:
            InvalidArgumentError: The value is too long.
            OverloadedError: There are too many.
        """
        check_record(kind, key, value)
        records = self._records.setdefault(kind, {})
        if if_absent and key in records:
            return records[key] == value
        if len(records) >= MAX_RECORDS and key not in records:
            raise OverloadedError(too_many_records(kind))
        records[key] = value
        self._num_changes[kind] = self._num_changes.get(kind, 0) + 1
        return True

    async def drop_record(self, kind: str, key: str) -> None:
        """Make `key` absent now; absent already is fine."""
        if self._records.get(kind, {}).pop(key, None) is not None:
            self._num_changes[kind] += 1

    async def list_records(self, kind: str, known_version: str = "") -> Records:
        """Return the records of a kind, ordered by key, unless `known_version` is theirs still."""
        if kind not in self._num_changes:
            return Records("", {})
        version = f"{self._born}:{self._num_changes[kind]}"
        if version == known_version:
            return Records(version, None)
        return Records(version, dict(sorted(self._records[kind].items())))

    async def append_journal(self, key: str, entries: Sequence[bytes]) -> int:
        """Append entries in order; return the journal's length after it. Renews its TTL.

        Raises:
            OverloadedError: The journal alone would exceed the budget of all journals.
        """
        journal = self._live_journal(key) or _Journal(0.0)
        if not journal.entries and not entries:
            return 0
        added = sum(map(len, entries)) + _ENTRY_OVERHEAD_BYTES * len(entries)
        if journal.num_bytes + added > self._max_journal_bytes:
            raise OverloadedError(
                f"journal {key}: {journal.num_bytes + added} bytes, limit of all journals: "
                f"{self._max_journal_bytes}: append less, or drop it"
            )
        journal.entries += entries
        journal.num_bytes += added
        journal.expires_s = self._clock.now() + self._config.journal_ttl_s
        self._journals[key] = journal
        self._journals.move_to_end(key)
        self._journal_bytes += added
        while self._journal_bytes > self._max_journal_bytes:
            self._drop_journal(next(iter(self._journals)))
        return len(journal.entries)

    async def read_journal(self, key: str, start: int = 0) -> list[bytes]:
        """Return the entries from index `start` (>= 0) on; empty where there are none."""
        assert start >= 0, f"{start=}"
        journal = self._live_journal(key)
        return journal.entries[start:] if journal else []

    async def drop_journal(self, key: str) -> None:
        """Delete a journal; absent already is fine."""
        self._drop_journal(key)

    async def ping(self) -> None:
        """Return."""

    async def close(self) -> None:
        """Do nothing: there is no connection."""

    def check_invariants(self) -> None:
        """Assert that bytes of journals and ends of counters are those of what is there."""
        assert self._journal_bytes == sum(j.num_bytes for j in self._journals.values())
        assert self._journal_bytes <= self._max_journal_bytes
        assert sorted(self._counters) == sorted(key for _, key in self._counter_ends)

    def _live_leases(self, kind: str) -> dict[str, _Expiring]:
        now_s = self._clock.now()
        leases = self._leases.get(kind, {})
        return {key: lease for key, lease in leases.items() if lease.expires_s > now_s}

    def _live_counter(self, key: str) -> int | None:
        """Return a counter's sum, None where there is none; forget all that have expired."""
        now_s = self._clock.now()
        while self._counter_ends and self._counter_ends[0][0] <= now_s:
            _, expired = heapq.heappop(self._counter_ends)
            del self._counters[expired]
        return self._counters.get(key)

    def _live_journal(self, key: str) -> _Journal | None:
        journal = self._journals.get(key)
        if journal is not None and journal.expires_s <= self._clock.now():
            self._drop_journal(key)
            return None
        return journal

    def _drop_journal(self, key: str) -> None:
        journal = self._journals.pop(key, None)
        if journal is not None:
            self._journal_bytes -= journal.num_bytes
