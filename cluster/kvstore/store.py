"""What replicas and gateways share beside KV blocks, and may lose at any time.

Four things with four lifetimes:

    leases     who is there             seconds; renewed by the owner, gone when it is silent
    counters   how much there was       minutes; from the first addition, not renewed
    journals   tokens of a request      minutes; appended to by one owner, within a byte budget
    records    what an operator wants   until they are dropped (registered prefixes)

KV blocks are in a `BlockStore` (block_store.py). Every call has a deadline
(`StoreConfig.timeout_s`) and raises `UnavailableError` when it passes or the store is out of reach.
Nothing on the path of a token waits for a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cluster.errors import InvalidArgumentError

MAX_RECORDS = 4096  # of one kind
MAX_RECORD_BYTES = 2**20  # of one value
MAX_COUNT = 2**52  # of a counter, either way: numbers in Lua are whole up to there


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one kind."""

    version: str  # another one after each change, also after a restart or flush; "" where none was
    values: dict[str, bytes] | None  # by key, ordered; None: as they were at the known version


@dataclass(frozen=True, slots=True)
class JournalWrite:
    """Entries to append to a journal, by who owns it."""

    key: str  # of the journal, not empty: the request's id
    scope: str  # whose it is: the tenant
    owner: str  # who writes; another one may claim it
    entries: tuple[bytes, ...]  # in order
    # Makes it anew, whatever was there of the same scope. The same entry a second time, because the
    # answer to the first was lost, makes nothing anew: somebody may have claimed it meanwhile.
    begins: bool = False
    ends: bool = False  # nothing follows: it is among the first to make room


class JournalOutcome(StrEnum):
    """How one write ended; nothing was changed unless it is `WRITTEN`."""

    WRITTEN = "written"
    LOST = "lost"  # another owner has claimed it, or begun it anew
    GONE = "gone"  # there is none: it has expired, made room, or never begun
    FOREIGN = "foreign"  # there is one of another scope
    FULL = "full"  # it alone would exceed the budget of all journals


@dataclass(frozen=True, slots=True)
class JournalWrites:
    """How the writes of one call ended."""

    outcomes: list[JournalOutcome]  # one per write, in order
    num_dropped_finished: int = 0  # journals that had ended and made room
    num_dropped_live: int = 0  # others that did: their requests cannot be resumed any more


@dataclass(frozen=True, slots=True)
class Journal:
    """A journal as it was read."""

    scope: str
    owner: str
    entries: list[bytes]  # the reader's own
    is_ended: bool


class Store(Protocol):
    """The contract; `embedded.py` and `redis_store.py` keep it, one test suite holds them to it."""

    async def put_lease(self, kind: str, key: str, value: bytes, ttl_s: float) -> None:
        """Make `key` present for `ttl_s` seconds, with `value`; renews and replaces."""
        ...

    async def drop_lease(self, kind: str, key: str) -> None:
        """Make `key` absent now; absent already is fine."""
        ...

    async def list_leases(self, kind: str) -> dict[str, bytes]:
        """Return the live leases of a kind, ordered by key."""
        ...

    async def count(
        self, key: str, amount: int, ttl_s: float, *, at_most: int | None = None
    ) -> int:
        """Add to a counter, which is 0 at first; return the sum, the amount included.

        Args:
            key: Of the counter.
            amount: 0 reads it, below 0 takes back; the sum stays within `MAX_COUNT`.
            ttl_s: After its first addition the counter is 0 again.
            at_most: Nothing is added if the sum would be more; it is returned all the same.
        """
        ...

    async def put_record(
        self, kind: str, key: str, value: bytes, *, if_absent: bool = False
    ) -> bool:
        """Keep `value` under `key` until it is dropped; return whether it is the one kept now.

        Args:
            kind: Without a colon.
            key: Not empty.
            value: Replaces what is there.
            if_absent: It replaces nothing: another value stays, and the answer is False.

        Raises:
            InvalidArgumentError: The value has more than `MAX_RECORD_BYTES`.
            OverloadedError: The kind has `MAX_RECORDS` already.
        """
        ...

    async def drop_record(self, kind: str, key: str) -> None:
        """Make `key` absent now; absent already is fine."""
        ...

    async def list_records(self, kind: str, known_version: str = "") -> Records:
        """Return the records of a kind, ordered by key.

        Args:
            kind: As written.
            known_version: `Records.version` of the caller's copy: nothing is sent if it is the
                current one. "": there is no copy.
        """
        ...

    async def write_journals(self, writes: Sequence[JournalWrite]) -> JournalWrites:
        """Append to journals, in order and in one round trip; renew the TTL of those written.

        Where there is no room (`StoreConfig.journal_bytes`) other journals are dropped: those that
        have ended, the one touched longest ago first, then the others likewise. A write and a
        claim touch a journal. Each write happens as a whole or not at all, the call need not.

        Raises:
            UnavailableError: Also where a part of the writes, or all of them, may have happened.
        """
        ...

    async def read_journal(self, key: str) -> Journal | None:
        """Return a journal of any scope; None where there is none."""
        ...

    async def claim_journal(self, key: str, scope: str, owner: str) -> Journal | None:
        """Make `owner` the one who writes, if there is a journal of this scope; renew its TTL.

        Returns:
            What is there, with its owner as it is now; None where there is none. One of another
            scope is returned unchanged: the caller compares.
        """
        ...

    async def ping(self) -> None:
        """Return if the store answers."""
        ...

    async def close(self) -> None:
        """Let go of connections; what is stored stays."""
        ...


def check_record(kind: str, key: str, value: bytes) -> None:
    """Check what every store refuses.

    Raises:
        InvalidArgumentError: The value has more than `MAX_RECORD_BYTES`.
    """
    assert key, "the empty key is the version's"
    if len(value) > MAX_RECORD_BYTES:
        raise InvalidArgumentError(
            f"record {kind}/{key} has {len(value)} bytes, limit={MAX_RECORD_BYTES}: make it smaller"
        )


def too_many_records(kind: str) -> str:
    """Return the text of the refusal of one more record."""
    return f"{MAX_RECORDS} records of kind {kind}, limit={MAX_RECORDS}: drop some first"
