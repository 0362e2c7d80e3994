"""Redis that fails: silent, slow, stopped, killed, full, read-only, or not letting in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from kvstore_kinds import fresh_keys, fresh_namespace, plain
from redis_server import RedisServer
from redis_topologies import client_of

from cluster.clock import WallClock
from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.kvstore.redis_blocks import RedisBlocks
from cluster.kvstore.redis_connection import RedisConnection
from cluster.kvstore.redis_link import Batch, RedisLink
from cluster.kvstore.redis_store import RedisStore
from cluster.kvstore.redis_url import parse_redis_url
from cluster.kvstore.store import JournalWrite

pytestmark = pytest.mark.integration

KEY, OTHER = fresh_keys(2)


def config_of(url: str, **knobs: object) -> StoreConfig:
    return StoreConfig.model_validate({"url": url, "namespace": fresh_namespace(), **knobs})


@contextlib.asynccontextmanager
async def serving(answer: Callable[[Any, Any], Any]) -> AsyncIterator[int]:
    """Run a server of our own; yields its port."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@pytest.mark.parametrize("scheme", ["redis", "redis+sentinel", "redis+cluster"])
async def test_redis_that_accepts_and_never_answers_costs_one_deadline(scheme: str) -> None:
    async with serving(ignore) as port:
        path = "/main" if "sentinel" in scheme else ""
        url = f"{scheme}://:secret@127.0.0.1:{port}{path}"
        config = config_of(url, timeout_s=0.2)
        store, blocks = RedisStore(config), RedisBlocks(config)
        calls = (
            lambda: store.put_lease("k", "a", b"", 1.0),
            lambda: store.write_journals([JournalWrite("r", "team", "A", (b"",))]),
            lambda: store.list_records("k"),
            lambda: blocks.put_blocks({KEY: b""}),
            lambda: blocks.get_blocks([KEY, OTHER]),
            blocks.ping,
        )
        for call in calls:
            start_s = time.monotonic()
            with pytest.raises(UnavailableError) as caught:
                await call()
            assert 0.05 < time.monotonic() - start_s < 1.0
            assert str(port) in str(caught.value)
            assert "secret" not in str(caught.value)
        await store.close()
        await blocks.close()


async def test_redis_that_answers_drop_by_drop_costs_one_deadline() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b":1\r\n")
                await asyncio.sleep(0.1)

    async with serving(drip) as port:
        blocks = RedisBlocks(config_of(f"redis://127.0.0.1:{port}", timeout_s=0.3))
        start_s = time.monotonic()
        with pytest.raises(UnavailableError):
            await blocks.has_blocks(fresh_keys(20))
        assert time.monotonic() - start_s < 1.2  # twenty drops would take two seconds
        await blocks.close()


async def test_redis_that_speaks_something_else_is_unavailable() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()

    async with serving(babble) as port:
        blocks = RedisBlocks(config_of(f"redis://127.0.0.1:{port}"))
        with pytest.raises(UnavailableError):
            await blocks.get_blocks([KEY])
        await blocks.close()


async def test_redis_that_is_stopped_times_out_and_goes_on_in_step() -> None:
    with RedisServer() as server:
        blocks = RedisBlocks(config_of(server.url, timeout_s=0.2))
        await blocks.put_blocks({KEY: b"one", OTHER: b"other"})
        os.kill(server.pid, signal.SIGSTOP)
        results = await asyncio.gather(
            *(blocks.get_blocks([KEY]) for _ in range(50)), return_exceptions=True
        )
        assert all(isinstance(result, UnavailableError) for result in results)
        os.kill(server.pid, signal.SIGCONT)
        # No reply to a call that was given up is taken for the reply to a later one.
        for _ in range(50):
            assert plain(await blocks.get_blocks([OTHER])) == [b"other"]
            assert await blocks.has_blocks([KEY, KEY]) == [True, True]
        await blocks.close()


async def test_redis_killed_is_unavailable_and_restarted_works_again() -> None:
    with RedisServer() as server:
        blocks = RedisBlocks(config_of(server.url, timeout_s=2.0))
        await asyncio.gather(*(blocks.put_blocks({KEY: b"payload"}) for _ in range(8)))
        server.kill()
        for _ in range(3):
            with pytest.raises(UnavailableError) as caught:
                await blocks.get_blocks([KEY])
        assert "\n" not in str(caught.value)
        server.start()
        assert plain(await blocks.get_blocks([KEY])) == [None]
        assert await blocks.put_blocks({KEY: b"payload"}) == [True]
        assert plain(await blocks.get_blocks([KEY])) == [b"payload"]
        await blocks.close()


async def test_redis_killed_in_the_middle_of_a_value_is_unavailable() -> None:
    with RedisServer() as server:
        blocks = RedisBlocks(config_of(server.url, timeout_s=5.0))
        keys = fresh_keys(40)
        for start in range(0, 40, 4):
            await blocks.put_blocks(dict.fromkeys(keys[start : start + 4], bytes(1_000_000)))
        call = asyncio.create_task(blocks.get_blocks(keys))
        await asyncio.sleep(0.01)
        server.kill()
        with pytest.raises(UnavailableError):
            await call
        await blocks.close()


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


async def test_redis_out_of_memory_keeps_what_it_has_and_takes_more_again() -> None:
    limit = ("--maxmemory", "24mb", "--maxmemory-policy", "noeviction")
    with RedisServer(limit) as server:
        blocks = RedisBlocks(config_of(server.url, timeout_s=5.0, max_bytes=2**30))
        keys = fresh_keys(120)
        num_refused = 0
        for start in range(0, 120, 4):  # 48 MB, of which at most half have room at any time
            piece = dict.fromkeys(keys[start : start + 4], bytes(400_000))
            try:
                assert await blocks.put_blocks(piece) == [True] * 4
            except UnavailableError as error:
                assert "OOM" in str(error)
                num_refused += 1
        assert 0 < num_refused < 12  # every other one: what is refused makes room for the next
        found = plain(await blocks.get_blocks(keys))
        assert 30 < sum(value is not None for value in found) < 60
        with client_of(server) as client:
            client.config_set("maxmemory", "8mb")
        with pytest.raises(UnavailableError, match="OOM"):
            await blocks.put_blocks({KEY: b""})
        still = plain(await blocks.get_blocks(keys))  # reads and uses go on
        assert sum(value is not None for value in still) >= 30
        await blocks.close()


async def test_redis_read_only_is_unavailable_until_it_is_not() -> None:
    with RedisServer() as server, RedisServer() as master:
        blocks = RedisBlocks(config_of(server.url, timeout_s=5.0))
        with client_of(server) as client:
            client.replicaof("127.0.0.1", master.port)
            with pytest.raises(UnavailableError, match="READONLY"):
                await blocks.put_blocks({KEY: b"payload"})
            client.replicaof("NO", "ONE")
        assert await blocks.put_blocks({KEY: b"payload"}) == [True]
        await blocks.close()


async def test_redis_every_call_is_one_write(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_exchanges = 0
    exchange = RedisConnection.exchange

    async def counted(self: RedisConnection, *arguments: Any) -> list[Any]:
        nonlocal num_exchanges
        num_exchanges += 1
        return await exchange(self, *arguments)

    monkeypatch.setattr(RedisConnection, "exchange", counted)
    config = config_of(redis_server.url, timeout_s=5.0)
    store, blocks = RedisStore(config), RedisBlocks(config)
    keys = fresh_keys(600)
    calls = (
        lambda: blocks.put_blocks(dict.fromkeys(keys, b"payload")),
        lambda: blocks.get_blocks(keys),
        lambda: blocks.has_blocks(keys),
        lambda: blocks.touch_blocks(keys, pinned=True),
        lambda: blocks.unpin_blocks(keys),
        lambda: blocks.stats(),
        lambda: store.put_lease("replica", "a", b"", 1.0),
        lambda: store.drop_lease("replica", "a"),
        lambda: store.list_leases("replica"),
        lambda: store.write_journals([JournalWrite("r", "team", "A", (b"x",), begins=True)] * 200),
        lambda: store.read_journal("r"),
        lambda: store.claim_journal("r", "team", "B"),
        lambda: store.put_record("prefix", "a", b""),
        lambda: store.list_records("prefix"),
    )
    for num_calls, call in enumerate(calls, 1):
        await call()
        assert num_exchanges == num_calls
    await store.close()
    await blocks.close()


async def test_redis_connections_are_bounded_and_used_again(redis_server: RedisServer) -> None:
    link = RedisLink(parse_redis_url(redis_server.url, "store.url"), 5.0, WallClock())
    batch = Batch(b"k", [("PING",)])
    with client_of(redis_server) as client:
        before = client.info("stats")["total_connections_received"]
        for _ in range(5):
            await asyncio.gather(*(link.run("ping", batch) for _ in range(100)))
        after = client.info("stats")["total_connections_received"]
    assert after - before <= 16
    await link.close()


async def test_redis_connections_that_the_server_closed_are_let_go() -> None:
    with RedisServer() as server:
        link = RedisLink(parse_redis_url(server.url, "store.url"), 5.0, WallClock())
        batch = Batch(b"k", [("PING",)])
        await asyncio.gather(*(link.run("ping", batch) for _ in range(16)))
        assert link._pool.num_idle == 16
        server.kill()
        deadline_s = time.monotonic() + 5.0
        while link._pool.num_idle:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)
        await link.close()


async def test_redis_connections_to_a_server_that_failed_are_let_go() -> None:
    with RedisServer() as server:
        link = RedisLink(parse_redis_url(server.url, "store.url"), 0.2, WallClock())
        batch = Batch(b"k", [("PING",)])
        await asyncio.gather(*(link.run("ping", batch) for _ in range(16)))
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(UnavailableError):
            await link.run("ping", batch)
        assert link._pool.num_idle == 0  # each would cost a deadline of its own
        os.kill(server.pid, signal.SIGCONT)
        assert await link.run("ping", batch) == [[b"PONG"]]
        await link.close()


async def test_redis_refusal_leaves_the_connection_in_step(redis_server: RedisServer) -> None:
    link = RedisLink(parse_redis_url(redis_server.url, "store.url"), 5.0, WallClock())
    for is_atomic in (False, True):
        bad = Batch(b"k", [("SET", "k", "v"), ("LPUSH", "k", "x"), ("PING",)], is_atomic)
        with pytest.raises(UnavailableError, match="WRONGTYPE"):
            await link.run("bad", bad)
        with pytest.raises(UnavailableError, match="unknown command"):
            await link.run("bad", Batch(b"k", [("NONSENSE",), ("PING",)], is_atomic))
        good = Batch(b"k", [("ECHO", b"x"), ("ECHO", b"y" * 20_000)], is_atomic)
        assert await link.run("good", good, good) == [[b"x", b"y" * 20_000]] * 2
    await link.close()
