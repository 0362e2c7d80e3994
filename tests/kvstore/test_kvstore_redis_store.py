"""What is Redis' own of leases, counters and records: keys, lifetimes, losses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis as redis_client
from kvstore_kinds import fresh_namespace
from redis_server import RedisServer
from redis_topologies import client_of

from cluster.config import StoreConfig
from cluster.kvstore.redis_store import RedisStore

pytestmark = pytest.mark.integration


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    config = StoreConfig(url=redis_server.url, namespace=fresh_namespace(), timeout_s=5.0)
    store = RedisStore(config)
    yield store
    await store.close()


@pytest.fixture
def raw(redis_server: RedisServer) -> redis_client.Redis:
    return client_of(redis_server)


async def test_redis_leases_and_counters_do_not_last_for_ever(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    await store.put_lease("replica", "a", b"", 30.0)
    await store.count("c", 1, 30.0)
    await store.count("read", 0, 30.0)
    names = raw.keys(f"*{store._config.namespace}*")
    assert len(names) == 3
    assert all(raw.pttl(name) > 0 for name in names)


async def test_redis_lease_index_keeps_only_what_lives(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    prefix = f"{{{store._config.namespace}}}:v2:"
    await store.put_lease("replica", "short", b"", 0.05)
    for key in ("long", "evicted", "dropped"):
        await store.put_lease("replica", key, b"", 30.0)
    await store.drop_lease("replica", "dropped")
    raw.delete(f"{prefix}lease:replica:evicted")
    await asyncio.sleep(0.1)
    assert await store.list_leases("replica") == {"long": b""}
    assert sorted(raw.zrange(f"{prefix}leases:replica", 0, -1)) == [b"evicted", b"long"]


async def test_redis_version_of_records_is_another_one_after_their_loss(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    await store.put_record("prefix", "a", b"1")
    before = (await store.list_records("prefix")).version
    raw.delete(f"{{{store._config.namespace}}}:v2:records:prefix")
    assert (await store.list_records("prefix", before)).values == {}
    await store.put_record("prefix", "a", b"1")
    again = await store.list_records("prefix", before)
    assert again.values == {"a": b"1"}
    assert again.version != before
    assert raw.pttl(f"{{{store._config.namespace}}}:v2:records:prefix") == -1
