"""What is Redis' own: its failures, its keys, what others write to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator

import pytest
import redis as redis_client
from kvstore_kinds import fresh_namespace
from redis_server import RedisServer

from cluster.config import StoreConfig
from cluster.errors import ConfigError, UnavailableError
from cluster.kvstore.codec import encode_block
from cluster.kvstore.redis_store import RedisStore

pytestmark = pytest.mark.integration

KEY, OTHER = b"k" * 16, b"o" * 16


def config_of(url: str, **knobs: object) -> StoreConfig:
    return StoreConfig.model_validate({"url": url, "namespace": fresh_namespace(), **knobs})


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(config_of(redis_server.url, timeout_s=5.0, max_bytes=2**20))
    yield store
    await store.close()


@pytest.fixture
def raw(redis_server: RedisServer) -> redis_client.Redis:
    return redis_client.Redis.from_url(redis_server.url, protocol=2)


def block_name(store: RedisStore, key: bytes) -> bytes:
    return f"{store._config.namespace}:v1:block:".encode() + key


async def test_redis_server_that_accepts_and_never_answers_costs_one_deadline() -> None:
    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    server = await asyncio.start_server(ignore, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = RedisStore(config_of(f"redis://:secret@127.0.0.1:{port}", timeout_s=0.2))
    calls = (
        lambda: store.put_lease("k", "a", b"", 1.0),
        lambda: store.list_leases("k"),
        lambda: store.put_blocks({KEY: b""}),
        lambda: store.get_blocks([KEY]),
        lambda: store.append_journal("r", [b""]),
        store.ping,
    )
    for call in calls:
        start_s = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            await call()
        assert 0.15 < time.monotonic() - start_s < 1.0
        assert str(port) in str(caught.value)
        assert "secret" not in str(caught.value)
    await store.close()
    server.close()


async def test_redis_server_that_answers_drop_by_drop_costs_one_deadline() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b":1\r\n")
                await asyncio.sleep(0.1)

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = RedisStore(config_of(f"redis://127.0.0.1:{port}", timeout_s=0.3))
    start_s = time.monotonic()
    with pytest.raises(UnavailableError):
        await store.has_blocks([KEY] * 20)
    assert time.monotonic() - start_s < 1.2  # twenty drops would take two seconds
    await store.close()
    server.close()


async def test_redis_server_that_is_stopped_times_out_and_goes_on_in_step() -> None:
    with RedisServer() as server:
        store = RedisStore(config_of(server.url, timeout_s=0.2))
        await store.put_blocks({KEY: b"one", OTHER: b"other"})
        os.kill(server.pid, signal.SIGSTOP)
        results = await asyncio.gather(
            *(store.get_blocks([KEY]) for _ in range(50)), return_exceptions=True
        )
        assert all(isinstance(result, UnavailableError) for result in results)
        os.kill(server.pid, signal.SIGCONT)
        # No reply to a call that was given up is taken for the reply to a later one.
        for _ in range(50):
            assert await store.get_blocks([OTHER]) == [b"other"]
            assert await store.has_blocks([KEY, KEY]) == [True, True]
        await store.close()


async def test_redis_killed_is_unavailable_and_restarted_works_again() -> None:
    with RedisServer() as server:
        store = RedisStore(config_of(server.url, timeout_s=2.0))
        await asyncio.gather(*(store.put_blocks({KEY: b"payload"}) for _ in range(8)))
        server.kill()
        for _ in range(3):
            with pytest.raises(UnavailableError) as caught:
                await store.get_blocks([KEY])
        assert "\n" not in str(caught.value)
        server.start()
        assert await store.get_blocks([KEY]) == [None]
        assert await store.put_blocks({KEY: b"payload"}) == 1
        assert await store.get_blocks([KEY]) == [b"payload"]
        await store.close()


async def test_redis_wrong_password_is_unavailable_and_never_told() -> None:
    with RedisServer(("--requirepass", "right")) as server:
        bad = server.url.replace("redis://", "redis://:hunter2@")
        store = RedisStore(config_of(bad))
        with pytest.raises(UnavailableError) as caught:
            await store.ping()
        assert "hunter2" not in str(caught.value)
        await store.close()
        store = RedisStore(config_of(server.url.replace("redis://", "redis://:right@")))
        await store.ping()
        await store.close()


@pytest.mark.parametrize(
    "url", ["redis://:hun/ter2@host:1", "redis://host:port", "redis://h:99999"]
)
def test_redis_url_that_cannot_be_read_is_refused_without_its_text(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RedisStore(config_of(url))
    assert caught.value.field == "store.url"
    assert "ter2" not in str(caught.value)
    assert caught.value.__suppress_context__  # a traceback does not show the parser's text either


async def test_redis_namespace_is_shared_by_all_who_open_it(store: RedisStore) -> None:
    other = RedisStore(store._config)
    await store.put_blocks({KEY: b"payload"})
    assert await other.get_blocks([KEY]) == [b"payload"]
    await other.close()


async def test_redis_damaged_or_misplaced_block_is_a_miss(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    await store.put_blocks({KEY: b"payload", OTHER: b"other"})
    data = raw.get(block_name(store, KEY))
    assert data == encode_block(b"payload", KEY)
    for bad in (data[:-1], data[:-1] + b"x", b"", b"payload", raw.get(block_name(store, OTHER))):
        raw.set(block_name(store, KEY), bad)
        assert await store.get_blocks([KEY, OTHER]) == [None, b"other"]
    await store.put_blocks({KEY: b"payload"})
    assert await store.get_blocks([KEY]) == [b"payload"]


async def test_redis_value_of_another_type_is_unavailable(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    raw.set(f"{store._config.namespace}:v1:journal:r", b"no list")
    with pytest.raises(UnavailableError, match="append_journal"):
        await store.append_journal("r", [b"entry"])


async def test_redis_counter_is_what_is_stored(store: RedisStore, raw: redis_client.Redis) -> None:
    namespace = store._config.namespace
    for i in range(40):
        await store.put_blocks({f"{i % 30}".encode().ljust(16): bytes(1000 * (i + 1))})
    names = raw.keys(f"{namespace}:v1:block:*")
    hashes = {name.removeprefix(f"{namespace}:v1:block:".encode()) for name in names}
    costs = raw.hgetall(f"{namespace}:v1:blocks:cost")
    used_bytes = int(costs.pop(b""))
    assert set(costs) == set(raw.zrange(f"{namespace}:v1:blocks:lru", 0, -1)) == hashes
    assert used_bytes == sum(map(int, costs.values())) <= 2**20
    # Frame and key are within the overhead that the budget counts.
    assert all(raw.strlen(block_name(store, h)) <= int(costs[h]) for h in hashes)


async def test_redis_nothing_lasts_for_ever(store: RedisStore, raw: redis_client.Redis) -> None:
    await store.put_lease("replica", "a", b"", 30.0)
    await store.put_blocks({KEY: b"payload"})
    await store.append_journal("r", [b"entry"])
    names = raw.keys(f"{store._config.namespace}:*")
    assert len(names) == 6
    assert all(raw.pttl(name) > 0 for name in names)


async def test_redis_recency_survives_a_server_clock_that_goes_back(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    keys = [f"{i}".encode().ljust(16) for i in range(3)]
    await store.put_blocks(dict.fromkeys(keys, bytes(300_000)))
    for key in keys:
        raw.zincrby(f"{store._config.namespace}:v1:blocks:lru", 3600e6, key)
    await store.get_blocks(keys[:1])
    await store.put_blocks({KEY: bytes(300_000)})
    assert await store.has_blocks(keys) == [True, False, True]
    await store.put_blocks({OTHER: bytes(300_000)})
    assert await store.has_blocks([*keys, KEY]) == [True, False, False, True]


async def test_redis_lease_index_keeps_only_what_lives(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    index = f"{store._config.namespace}:v1:leases:replica"
    await store.put_lease("replica", "short", b"", 0.05)
    for key in ("long", "evicted", "dropped"):
        await store.put_lease("replica", key, b"", 30.0)
    await store.drop_lease("replica", "dropped")
    raw.delete(f"{store._config.namespace}:v1:lease:replica:evicted")
    await asyncio.sleep(0.1)
    assert await store.list_leases("replica") == {"long": b""}
    assert sorted(raw.zrange(index, 0, -1)) == [b"evicted", b"long"]


@pytest.mark.parametrize("lost", ["lru", "cost"])
async def test_redis_lost_index_does_not_stop_writes(
    store: RedisStore, raw: redis_client.Redis, lost: str
) -> None:
    for i in range(12):
        await store.put_blocks({f"a{i}".encode().ljust(16): bytes(100_000)})
    raw.delete(f"{store._config.namespace}:v1:blocks:{lost}")
    keys = [f"b{i}".encode().ljust(16) for i in range(30)]
    for key in keys:
        assert await store.put_blocks({key: bytes(100_000)}) == 1
    present = await store.has_blocks(keys)
    assert present[-5:] == [True] * 5
    assert sum(present) <= 10


async def test_redis_flush_loses_the_past_only(store: RedisStore) -> None:
    await store.put_lease("replica", "a", b"", 30.0)
    await store.put_blocks({KEY: b"payload"})
    await store._redis.flushall()
    await store._redis.script_flush()
    assert await store.list_leases("replica") == {}
    assert await store.get_blocks([KEY]) == [None]
    await store.put_blocks({KEY: b"payload"})
    assert await store.get_blocks([KEY]) == [b"payload"]


async def test_redis_every_call_is_one_round_trip(store: RedisStore) -> None:
    await store.ping()
    (connection,) = store._redis.connection_pool._available_connections
    num_writes = 0
    write = connection._writer.writelines

    def count(data: object) -> None:
        nonlocal num_writes
        num_writes += 1
        write(data)

    connection._writer.writelines = count
    await store.put_blocks({KEY: b"payload", OTHER: b""})
    await store.get_blocks([KEY, OTHER])
    await store.has_blocks([KEY, OTHER])
    await store.put_lease("replica", "a", b"", 1.0)
    await store.list_leases("replica")
    await store.append_journal("r", [b"entry"])
    assert num_writes == 6
