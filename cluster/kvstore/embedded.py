"""Leases, counters, journals and records in the memory of one process: the one-machine default.

It answers at once and never raises `UnavailableError`: `embedded_actor.py` puts it into a process
of its own, where a deadline has a meaning. It is the model of a right store, too.
"""

from __future__ import annotations

import heapq
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.clock import Clock
from cluster.config import StoreConfig
from cluster.errors import OverloadedError
from cluster.kvstore.embedded_journals import EmbeddedJournals
from cluster.kvstore.store import (
    MAX_COUNT,
    MAX_RECORDS,
    Journal,
    JournalWrite,
    JournalWrites,
    Records,
    check_record,
    too_many_records,
)

MAX_COUNTERS = 2**17


@dataclass(frozen=True, slots=True)
class _Expiring:
    value: bytes
    expires_s: float


class EmbeddedStore:
    """The `Store` protocol on plain dictionaries.

    Args:
        config: TTL and budget of journals.
        clock: For the TTLs.
    """

    def __init__(self, config: StoreConfig, clock: Clock) -> None:
        self._clock = clock
        self._leases: dict[str, dict[str, _Expiring]] = {}
        self._counters: dict[str, int] = {}  # sums
        self._counter_ends: list[tuple[float, str]] = []  # a heap of when each counter expires
        self._records: dict[str, dict[str, bytes]] = {}
        self._born = uuid.uuid4().hex  # no version of another life of this store is like ours
        self._num_changes: dict[str, int] = {}
        self._journals = EmbeddedJournals(config, clock)

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

    async def write_journals(self, writes: Sequence[JournalWrite]) -> JournalWrites:
        """Append to journals, in order; renew the TTL of those written."""
        return self._journals.write(writes)

    async def read_journal(self, key: str) -> Journal | None:
        """Return a journal of any scope; None where there is none."""
        return self._journals.read(key)

    async def claim_journal(self, key: str, scope: str, owner: str) -> Journal | None:
        """Make `owner` the one who writes, if there is a journal of this scope; renew its TTL."""
        return self._journals.claim(key, scope, owner)

    async def ping(self) -> None:
        """Return."""

    async def close(self) -> None:
        """Do nothing: there is no connection."""

    def check_invariants(self) -> None:
        """Assert that bytes of journals and ends of counters are those of what is there."""
        self._journals.check_invariants()
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
