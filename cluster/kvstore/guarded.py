"""A store that cannot hurt who calls it: few calls on their way, and none to one that is silent.

The stores themselves have deadlines. A guard adds what many callers of one process need: a bound of
the calls in flight, and a circuit breaker, so that a dead store costs a deadline now and then
rather than one per request. Movers go without: their engine has a breaker of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from cluster.clock import Clock
from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.kvstore.block_store import BlockStore, BlockStoreStats, Buffer, FetchedBlocks
from cluster.kvstore.breaker import BreakerState, CircuitBreaker
from cluster.kvstore.store import Journal, JournalWrite, JournalWrites, Records, Store


class Guard:
    """Admission of calls to one endpoint.

    Args:
        config: `max_inflight_calls` bounds those on their way.
        clock: Of the circuit breaker.
    """

    def __init__(self, config: StoreConfig, clock: Clock) -> None:
        self._max_calls = config.max_inflight_calls
        # No probe is given up before its own deadline.
        self._breaker = CircuitBreaker(clock, max_open_s=max(2.0, 2 * config.timeout_s))
        self._num_calls = 0

    @property
    def state(self) -> BreakerState:
        """What is let through at present."""
        return self._breaker.state

    @contextmanager
    def call(self) -> Iterator[None]:
        """Enclose one call: what it raises tells how it ended.

        Raises:
            UnavailableError: Too many are on their way, or the endpoint failed too often lately.
        """
        if self._num_calls >= self._max_calls:
            raise UnavailableError(
                f"store: {self._num_calls} calls are on their way, "
                f"store.max_inflight_calls={self._max_calls}: the store is too slow for this load"
            )
        if not self._breaker.allow():
            raise UnavailableError("store: it did not answer lately, its circuit breaker is open")
        self._num_calls += 1
        try:
            yield
        except UnavailableError:
            self._breaker.failed()
            raise
        except Exception:  # it answered: a refusal
            self._breaker.succeeded()
            raise
        else:
            self._breaker.succeeded()
        finally:
            self._num_calls -= 1


class GuardedStore:
    """The `Store` protocol behind a `Guard`.

    Args:
        store: The store itself; closed with this.
        guard: Of its endpoint.
    """

    def __init__(self, store: Store, guard: Guard) -> None:
        self._store = store
        self._guard = guard

    @property
    def state(self) -> BreakerState:
        """Of the circuit breaker."""
        return self._guard.state

    async def put_lease(self, kind: str, key: str, value: bytes, ttl_s: float) -> None:
        """Make `key` present for `ttl_s` seconds, with `value`; renews and replaces."""
        with self._guard.call():
            await self._store.put_lease(kind, key, value, ttl_s)

    async def drop_lease(self, kind: str, key: str) -> None:
        """Make `key` absent now; absent already is fine."""
        with self._guard.call():
            await self._store.drop_lease(kind, key)

    async def list_leases(self, kind: str) -> dict[str, bytes]:
        """Return the live leases of a kind, ordered by key."""
        with self._guard.call():
            return await self._store.list_leases(kind)

    async def count(
        self, key: str, amount: int, ttl_s: float, *, at_most: int | None = None
    ) -> int:
        """Add to a counter, which is 0 at first; return the sum, the amount included."""
        with self._guard.call():
            return await self._store.count(key, amount, ttl_s, at_most=at_most)

    async def put_record(
        self, kind: str, key: str, value: bytes, *, if_absent: bool = False
    ) -> bool:
        """Keep `value` under `key` until it is dropped; return whether it is the one kept now."""
        with self._guard.call():
            return await self._store.put_record(kind, key, value, if_absent=if_absent)

    async def drop_record(self, kind: str, key: str) -> None:
        """Make `key` absent now; absent already is fine."""
        with self._guard.call():
            await self._store.drop_record(kind, key)

    async def list_records(self, kind: str, known_version: str = "") -> Records:
        """Return the records of a kind, ordered by key, unless `known_version` is theirs still."""
        with self._guard.call():
            return await self._store.list_records(kind, known_version)

    async def write_journals(self, writes: Sequence[JournalWrite]) -> JournalWrites:
        """Append to journals, in order and in one round trip; renew the TTL of those written."""
        with self._guard.call():
            return await self._store.write_journals(writes)

    async def read_journal(self, key: str) -> Journal | None:
        """Return a journal of any scope; None where there is none."""
        with self._guard.call():
            return await self._store.read_journal(key)

    async def claim_journal(self, key: str, scope: str, owner: str) -> Journal | None:
        """Make `owner` the one who writes, if there is a journal of this scope; renew its TTL."""
        with self._guard.call():
            return await self._store.claim_journal(key, scope, owner)

    async def ping(self) -> None:
        """Return if the store answers."""
        with self._guard.call():
            await self._store.ping()

    async def close(self) -> None:
        """Let go of connections; what is stored stays."""
        await self._store.close()


class GuardedBlocks:
    """The `BlockStore` protocol behind a `Guard`.

    Args:
        blocks: The store itself; closed with this.
        guard: Of its endpoint.
    """

    def __init__(self, blocks: BlockStore, guard: Guard) -> None:
        self._blocks = blocks
        self._guard = guard

    @property
    def state(self) -> BreakerState:
        """Of the circuit breaker."""
        return self._guard.state

    async def put_blocks(
        self, blocks: Mapping[bytes, Buffer], *, pinned: bool = False, position: int = 0
    ) -> list[bool]:
        """Write a chain's blocks, first one first; return which are stored now."""
        with self._guard.call():
            return await self._blocks.put_blocks(blocks, pinned=pinned, position=position)

    async def get_blocks(self, keys: Sequence[bytes]) -> FetchedBlocks:
        """Return the bytes of each block, bit-exact, and count this as a use of those found."""
        with self._guard.call():
            return await self._blocks.get_blocks(keys)

    async def has_blocks(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks are present; no use is counted."""
        with self._guard.call():
            return await self._blocks.has_blocks(keys)

    async def touch_blocks(self, keys: Sequence[bytes], *, pinned: bool = False) -> list[bool]:
        """Return which blocks are present, and count a use of them: value and TTL are renewed."""
        with self._guard.call():
            return await self._blocks.touch_blocks(keys, pinned=pinned)

    async def unpin_blocks(self, keys: Sequence[bytes]) -> None:
        """Let blocks be evicted again, as if just used; absent ones are fine."""
        with self._guard.call():
            await self._blocks.unpin_blocks(keys)

    async def hottest(self, prefix: bytes, limit: int) -> list[bytes]:
        """Return at most `limit` keys that begin with `prefix`: pinned ones, then by value."""
        with self._guard.call():
            return await self._blocks.hottest(prefix, limit)

    async def flush(self) -> int:
        """Forget every block of the namespace, in small steps; return how many."""
        with self._guard.call():
            return await self._blocks.flush()

    async def stats(self) -> BlockStoreStats:
        """Return the books."""
        with self._guard.call():
            return await self._blocks.stats()

    async def ping(self) -> None:
        """Return if the store answers."""
        with self._guard.call():
            await self._blocks.ping()

    async def close(self) -> None:
        """Let go of connections; what is stored stays."""
        await self._blocks.close()
