"""What replicas and gateways share, and may lose at any time.

Three things with three lifetimes:

    leases     who is there           seconds; renewed by the owner, gone when it is silent
    blocks     KV cache of prefixes   up to an hour and a byte budget; a miss costs a recomputation
    journals   tokens of a request    minutes; append and read from a position

Every call has a deadline (`StoreConfig.timeout_s`) and raises `UnavailableError` when it passes or
the store is out of reach. Nothing on the path of a token waits for a store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


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

    async def put_blocks(self, blocks: Mapping[bytes, bytes]) -> int:
        """Write blocks, oldest given first; return how many were stored.

        The budget holds at all times: the least recently used blocks make room, and a block larger
        than the budget is not stored.
        """
        ...

    async def get_blocks(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the bytes of each block, bit-exact; None where missing or damaged."""
        ...

    async def has_blocks(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks are present, without touching their recency."""
        ...

    async def append_journal(self, key: str, entries: Sequence[bytes]) -> int:
        """Append entries in order; return the journal's length after it. Renews its TTL."""
        ...

    async def read_journal(self, key: str, start: int = 0) -> list[bytes]:
        """Return the entries from index `start` on; empty where there are none."""
        ...

    async def drop_journal(self, key: str) -> None:
        """Delete a journal; absent already is fine."""
        ...

    async def ping(self) -> None:
        """Return if the store answers."""
        ...

    async def close(self) -> None:
        """Let go of connections; what is stored stays."""
        ...
