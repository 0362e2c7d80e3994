"""The embedded stores in one named Ray actor, and the `Store` and `BlockStore` that talk to it.

One actor per store namespace, whoever comes first creates it. It is detached: a gateway or a leader
that happened to create it may die without taking it along, so `sluice serve` deletes it at its end.
A restarted actor is empty, which a store may be at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import PendingCallsLimitExceeded, RayError, RayTaskError

from cluster.clock import WallClock
from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.kvstore.block_store import BlockStoreStats, Buffer, FetchedBlocks
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.embedded_blocks import EmbeddedBlocks
from cluster.kvstore.store import Journal, JournalWrite, JournalWrites, Records

RAY_NAMESPACE = "sluice"
MAX_PENDING_CALLS = 1000  # per client; more are refused at once


class EmbeddedHome:
    """Both embedded stores, in one process.

    Args:
        config: Of both.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._store = EmbeddedStore(config, WallClock())
        self._blocks = EmbeddedBlocks(config, WallClock())

    async def store(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the store."""
        return await getattr(self._store, method)(*arguments, **options)

    async def blocks(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the store of blocks."""
        return await getattr(self._blocks, method)(*arguments, **options)


def get_or_create_actor(config: StoreConfig) -> Any:
    """Return a handle of the actor of `config.namespace`, which may still be starting.

    An actor that exists keeps the configuration that it was created with.
    """
    return (
        ray.remote(EmbeddedHome)
        .options(
            name=_actor_name(config.namespace),
            namespace=RAY_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=MAX_PENDING_CALLS,
            max_pending_calls=MAX_PENDING_CALLS,
        )
        .remote(config)
    )


def delete_actor(namespace: str) -> None:
    """End the actor of a store namespace, with all that it holds; none is fine."""
    try:
        actor = ray.get_actor(_actor_name(namespace), namespace=RAY_NAMESPACE)
    except ValueError:
        return
    ray.kill(actor, no_restart=True)


def _actor_name(namespace: str) -> str:
    return f"store-{namespace}"


class EmbeddedStoreClient:
    """The `Store` protocol over an actor.

    Args:
        actor: Handle of `get_or_create_actor`.
        timeout_s: Deadline of one call.
    """

    def __init__(self, actor: Any, timeout_s: float) -> None:
        self._actor = actor
        self._timeout_s = timeout_s

    async def put_lease(self, kind: str, key: str, value: bytes, ttl_s: float) -> None:
        """Make `key` present for `ttl_s` seconds, with `value`; renews and replaces."""
        await self._call("put_lease", kind, key, value, ttl_s)

    async def drop_lease(self, kind: str, key: str) -> None:
        """Make `key` absent now; absent already is fine."""
        await self._call("drop_lease", kind, key)

    async def list_leases(self, kind: str) -> dict[str, bytes]:
        """Return the live leases of a kind, ordered by key."""
        leases: dict[str, bytes] = await self._call("list_leases", kind)
        return leases

    async def count(
        self, key: str, amount: int, ttl_s: float, *, at_most: int | None = None
    ) -> int:
        """Add to a counter, which is 0 at first; return the sum, the amount included."""
        return int(await self._call("count", key, amount, ttl_s, at_most=at_most))

    async def put_record(
        self, kind: str, key: str, value: bytes, *, if_absent: bool = False
    ) -> bool:
        """Keep `value` under `key` until it is dropped; return whether it is the one kept now."""
        return bool(await self._call("put_record", kind, key, value, if_absent=if_absent))

    async def drop_record(self, kind: str, key: str) -> None:
        """Make `key` absent now; absent already is fine."""
        await self._call("drop_record", kind, key)

    async def list_records(self, kind: str, known_version: str = "") -> Records:
        """Return the records of a kind, ordered by key, unless `known_version` is theirs still."""
        records: Records = await self._call("list_records", kind, known_version)
        return records

    async def write_journals(self, writes: Sequence[JournalWrite]) -> JournalWrites:
        """Append to journals, in order and in one round trip; renew the TTL of those written."""
        written: JournalWrites = await self._call("write_journals", list(writes))
        return written

    async def read_journal(self, key: str) -> Journal | None:
        """Return a journal of any scope; None where there is none."""
        journal: Journal | None = await self._call("read_journal", key)
        return journal

    async def claim_journal(self, key: str, scope: str, owner: str) -> Journal | None:
        """Make `owner` the one who writes, if there is a journal of this scope; renew its TTL."""
        journal: Journal | None = await self._call("claim_journal", key, scope, owner)
        return journal

    async def ping(self) -> None:
        """Return if the actor answers."""
        await self._call("ping")

    async def close(self) -> None:
        """Do nothing: the actor belongs to the cluster."""

    async def _call(self, method: str, *arguments: object, **options: object) -> Any:
        call = self._actor.store.remote
        return await _answered(call, self._timeout_s, method, *arguments, **options)


class EmbeddedBlocksClient:
    """The `BlockStore` protocol over an actor.

    Args:
        actor: Handle of `get_or_create_actor`.
        timeout_s: Deadline of one call.
    """

    def __init__(self, actor: Any, timeout_s: float) -> None:
        self._actor = actor
        self._timeout_s = timeout_s

    async def put_blocks(
        self, blocks: Mapping[bytes, Buffer], *, pinned: bool = False, position: int = 0
    ) -> list[bool]:
        """Write a chain's blocks, first one first; return which are stored now."""
        # A view cannot travel, what it shows can.
        written = {key: bytes(payload) for key, payload in blocks.items()}
        stored: list[bool] = await self._call(
            "put_blocks", written, pinned=pinned, position=position
        )
        return stored

    async def get_blocks(self, keys: Sequence[bytes]) -> FetchedBlocks:
        """Return the bytes of each block, bit-exact, and count this as a use of those found."""
        fetched: FetchedBlocks = await self._call("get_blocks", list(keys))
        return fetched

    async def has_blocks(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks are present; no use is counted."""
        found: list[bool] = await self._call("has_blocks", list(keys))
        return found

    async def touch_blocks(self, keys: Sequence[bytes], *, pinned: bool = False) -> list[bool]:
        """Return which blocks are present, and count a use of them: value and TTL are renewed."""
        found: list[bool] = await self._call("touch_blocks", list(keys), pinned=pinned)
        return found

    async def unpin_blocks(self, keys: Sequence[bytes]) -> None:
        """Let blocks be evicted again, as if just used; absent ones are fine."""
        await self._call("unpin_blocks", list(keys))

    async def hottest(self, prefix: bytes, limit: int) -> list[bytes]:
        """Return at most `limit` keys that begin with `prefix`: pinned ones, then by value."""
        keys: list[bytes] = await self._call("hottest", prefix, limit)
        return keys

    async def flush(self) -> int:
        """Forget every block; return how many."""
        return int(await self._call("flush"))

    async def stats(self) -> BlockStoreStats:
        """Return the books."""
        stats: BlockStoreStats = await self._call("stats")
        return stats

    async def ping(self) -> None:
        """Return if the actor answers."""
        await self._call("ping")

    async def close(self) -> None:
        """Do nothing: the actor belongs to the cluster."""

    async def _call(self, method: str, *arguments: object, **options: object) -> Any:
        call = self._actor.blocks.remote
        return await _answered(call, self._timeout_s, method, *arguments, **options)


async def _answered(
    call: Any, timeout_s: float, method: str, *arguments: object, **options: object
) -> Any:
    """Call the actor.

    Raises:
        UnavailableError: It did not answer in time, is starting, restarting, or gone.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await call(method, *arguments, **options)
    except TimeoutError:
        problem = f"no answer within store.timeout_s={timeout_s:g}"
    except RayTaskError:  # a bug or a refusal of the store itself
        raise
    except PendingCallsLimitExceeded:
        problem = f"{MAX_PENDING_CALLS} calls are waiting for it"
    except RayError as error:
        problem = f"{type(error).__name__}, it restarts by itself unless it was deleted"
    raise UnavailableError(f"embedded store, {method}: {problem}")
