"""A store in the memory of one process: the one-machine default, and the model of a right store.

    blocks     LRU order, oldest first     | b7 | b2 | b9 | b4 |     evicted from the left
    journals   order of the last append    | j3 | j1 | j8 |          dropped from the left

It answers at once and never raises `UnavailableError`: `embedded_actor.py` puts it into a process
of its own, where a deadline has a meaning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.clock import Clock
from cluster.config import StoreConfig
from cluster.errors import OverloadedError
from cluster.kvstore.budget import block_cost, newest_that_fit

MAX_JOURNAL_BYTES = 64 * 2**20
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
        config: TTLs and the budget of blocks.
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
        self._blocks: OrderedDict[bytes, _Expiring] = OrderedDict()
        self._block_bytes = 0
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

    async def put_blocks(self, blocks: Mapping[bytes, bytes]) -> int:
        """Write blocks, oldest given first; return how many of them are stored now."""
        fitting = newest_that_fit(blocks, self._config.max_bytes)
        expires_s = self._clock.now() + self._config.kv_ttl_s
        for key in fitting:
            self._drop_block(key)
        self._make_room(sum(map(block_cost, fitting.values())))
        for key, value in fitting.items():
            self._blocks[key] = _Expiring(value, expires_s)
            self._block_bytes += block_cost(value)
        return len(fitting)

    async def get_blocks(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the bytes of each block and mark it as used; None where it is missing."""
        found: list[bytes | None] = []
        for key in keys:
            block = self._live_block(key)
            if block is not None:
                self._blocks.move_to_end(key)
            found.append(block.value if block else None)
        return found

    async def has_blocks(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks are present, without touching their recency."""
        return [self._live_block(key) is not None for key in keys]

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
        """Assert that the counters are what is stored, and within the budgets."""
        assert self._block_bytes == sum(block_cost(b.value) for b in self._blocks.values())
        assert self._block_bytes <= self._config.max_bytes
        assert self._journal_bytes == sum(j.num_bytes for j in self._journals.values())
        assert self._journal_bytes <= self._max_journal_bytes

    def _live_leases(self, kind: str) -> dict[str, _Expiring]:
        now_s = self._clock.now()
        leases = self._leases.get(kind, {})
        return {key: lease for key, lease in leases.items() if lease.expires_s > now_s}

    def _live_block(self, key: bytes) -> _Expiring | None:
        block = self._blocks.get(key)
        if block is not None and block.expires_s <= self._clock.now():
            self._drop_block(key)
            return None
        return block

    def _drop_block(self, key: bytes) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self._block_bytes -= block_cost(block.value)

    def _make_room(self, num_bytes: int) -> None:
        while self._block_bytes + num_bytes > self._config.max_bytes:
            self._drop_block(next(iter(self._blocks)))

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
