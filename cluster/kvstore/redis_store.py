"""A store in Redis: shared by machines, survives the cluster.

    {ns}:v1:lease:{kind}:{key}     string, PX    value of a lease
    {ns}:v1:leases:{kind}          zset          keys of a kind by the time of their expiry
    {ns}:v1:block:{hash}           string, PX    a framed block (codec.py)
    {ns}:v1:blocks:lru             zset          hashes by recency
    {ns}:v1:blocks:cost            hash          hash -> bytes in the budget; '' -> their sum
    {ns}:v1:journal:{key}          list, PX      entries

Sluice keeps the budget itself, whatever `maxmemory` says: scripts (redis_scripts.py) evict and
count in the same atomic step that writes. Every operation is one round trip with one deadline.
Nothing is retried: an append that is sent twice would be there twice, and every caller can do
without the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cluster.config import StoreConfig
from cluster.errors import ConfigError, UnavailableError
from cluster.kvstore.budget import block_cost, newest_that_fit
from cluster.kvstore.codec import decode_block, encode_block
from cluster.kvstore.redis_scripts import LIST_LEASES, MAKE_ROOM, PUT_LEASE, TOUCH

MAX_CONNECTIONS = 16


class RedisStore:
    """The `Store` protocol on one Redis server; belongs to the event loop that first uses it.

    Args:
        config: `resolved_url` says where; no connection is made before the first call.

    Raises:
        ConfigError: The URL cannot be read.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self._prefix = f"{config.namespace}:v1:"
        try:
            pool = aioredis.BlockingConnectionPool.from_url(
                config.resolved_url,
                max_connections=MAX_CONNECTIONS,
                timeout=config.timeout_s,  # to wait for one of them
                socket_timeout=config.timeout_s,
                socket_connect_timeout=config.timeout_s,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except ValueError:  # its text may hold a part of the password
            raise ConfigError(
                "store.url cannot be read: use redis://user:password@host:port/db, the password "
                "percent-encoded",
                field="store.url",
            ) from None
        where = pool.connection_kwargs
        self._address = where.get("path") or f"{where.get('host')}:{where.get('port', 6379)}"
        self._redis: aioredis.Redis = aioredis.Redis.from_pool(pool)

    async def put_lease(self, kind: str, key: str, value: bytes, ttl_s: float) -> None:
        """Make `key` present for `ttl_s` seconds, with `value`; renews and replaces."""
        keys = [self._lease(kind, key), self._lease_index(kind)]
        async with self._call("put_lease") as pipe:
            pipe.eval(PUT_LEASE, 2, *keys, key, value, _ms(ttl_s))
            await pipe.execute()

    async def drop_lease(self, kind: str, key: str) -> None:
        """Make `key` absent now; absent already is fine."""
        async with self._call("drop_lease") as pipe:
            pipe.delete(self._lease(kind, key)).zrem(self._lease_index(kind), key)
            await pipe.execute()

    async def list_leases(self, kind: str) -> dict[str, bytes]:
        """Return the live leases of a kind, ordered by key."""
        async with self._call("list_leases") as pipe:
            pipe.eval(LIST_LEASES, 1, self._lease_index(kind), self._lease(kind, ""))
            (flat,) = await pipe.execute()
        leases = zip(flat[::2], flat[1::2], strict=True)
        return dict(sorted((key.decode(), value) for key, value in leases))

    async def put_blocks(self, blocks: Mapping[bytes, bytes]) -> int:
        """Write blocks, oldest given first; return how many of them are stored now."""
        fitting = newest_that_fit(blocks, self._config.max_bytes)
        if not fitting:
            return 0
        ttl_ms = _ms(self._config.kv_ttl_s)
        arguments: list[bytes | int] = [self._block(b""), self._config.max_bytes, ttl_ms]
        for key, payload in fitting.items():
            arguments += (key, block_cost(payload))
        # One transaction: no other client sees a block that is counted and missing, or the reverse.
        async with self._call("put_blocks", transaction=True) as pipe:
            pipe.eval(MAKE_ROOM, 2, *self._block_index(), *arguments)
            for key, payload in fitting.items():
                # A frame names its block: a value under a wrong key does not verify.
                pipe.set(self._block(key), encode_block(payload, key), px=ttl_ms)
            await pipe.execute()
        return len(fitting)

    async def get_blocks(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the bytes of each block and mark it as used; None: missing or not verified."""
        if not keys:
            return []
        async with self._call("get_blocks") as pipe:
            pipe.mget([self._block(key) for key in keys])
            pipe.eval(TOUCH, 2, *self._block_index(), self._block(b""), *keys)
            values, _ = await pipe.execute()
        return [
            None if value is None else decode_block(value, key)
            for key, value in zip(keys, values, strict=True)
        ]

    async def has_blocks(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks are present, without touching their recency."""
        async with self._call("has_blocks") as pipe:
            for key in keys:
                pipe.exists(self._block(key))
            return [bool(count) for count in await pipe.execute()]

    async def append_journal(self, key: str, entries: Sequence[bytes]) -> int:
        """Append entries in order; return the journal's length after it. Renews its TTL."""
        name = self._journal(key)
        async with self._call("append_journal", transaction=True) as pipe:
            if entries:
                pipe.rpush(name, *entries)
            pipe.llen(name).pexpire(name, _ms(self._config.journal_ttl_s))
            *_, length, _ = await pipe.execute()
        return int(length)

    async def read_journal(self, key: str, start: int = 0) -> list[bytes]:
        """Return the entries from index `start` (>= 0) on; empty where there are none."""
        assert start >= 0, f"{start=}"
        async with self._call("read_journal") as pipe:
            pipe.lrange(self._journal(key), start, -1)
            (entries,) = await pipe.execute()
        return list(entries)

    async def drop_journal(self, key: str) -> None:
        """Delete a journal; absent already is fine."""
        async with self._call("drop_journal") as pipe:
            pipe.unlink(self._journal(key))
            await pipe.execute()

    async def ping(self) -> None:
        """Return if the server answers."""
        async with self._call("ping") as pipe:
            pipe.ping()
            await pipe.execute()

    async def close(self) -> None:
        """Close the connections; what is stored stays."""
        await self._redis.aclose(close_connection_pool=True)

    @asynccontextmanager
    async def _call(self, name: str, *, transaction: bool = False) -> AsyncIterator[Any]:
        """Yield a pipeline for one operation, under its deadline.

        Raises:
            UnavailableError: Redis cannot be reached, refused, or did not answer in time.
        """
        pipe = self._redis.pipeline(transaction=transaction)
        try:
            async with asyncio.timeout(self._config.timeout_s):
                yield pipe  # every use ends with execute(), which gives the connection back
        except TimeoutError:
            problem = f"no answer within store.timeout_s={self._config.timeout_s:g}"
        except (RedisError, OSError) as error:
            problem = (str(error) or type(error).__name__).splitlines()[0]
        else:
            return
        raise UnavailableError(f"Redis at {self._address}, {name}: {problem}")

    def _lease(self, kind: str, key: str) -> str:
        assert ":" not in kind, f"{kind=}: a colon would let kinds collide"
        return f"{self._prefix}lease:{kind}:{key}"

    def _lease_index(self, kind: str) -> str:
        return f"{self._prefix}leases:{kind}"

    def _block(self, key: bytes) -> bytes:
        return f"{self._prefix}block:".encode() + key

    def _block_index(self) -> tuple[str, str]:
        blocks = f"{self._prefix}blocks:"
        return blocks + "lru", blocks + "cost"

    def _journal(self, key: str) -> str:
        return f"{self._prefix}journal:{key}"


def _ms(duration_s: float) -> int:
    return max(1, round(duration_s * 1000))
