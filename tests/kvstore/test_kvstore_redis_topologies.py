"""Ways to Redis: TLS, ACL, a socket's path, a failover, a cluster that changes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import redis
from kvstore_kinds import fresh_keys, fresh_namespace, plain
from redis_server import RedisServer, free_port
from redis_topologies import RedisSentinel, client_of, cluster_url, redis_cluster

from cluster.clock import VirtualClock
from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.kvstore.redis_blocks import RedisBlocks
from cluster.kvstore.redis_link import Batch, RedisLink
from cluster.kvstore.redis_store import RedisStore
from cluster.kvstore.redis_url import parse_redis_url
from cluster.kvstore.store import Journal, JournalOutcome, JournalWrite

pytestmark = pytest.mark.integration

BEGIN = JournalWrite("r", "team", "A", (b"entry",), begins=True)
KEYS = fresh_keys(64)
BLOCKS = {key: key * 3000 for key in KEYS}


def config_of(url: str, **knobs: object) -> StoreConfig:
    knobs = {"namespace": fresh_namespace(), "timeout_s": 5.0} | knobs
    return StoreConfig.model_validate({"url": url, **knobs})


async def works(url: str) -> None:
    """Write and read through both kinds of stores."""
    store, blocks = RedisStore(config_of(url)), RedisBlocks(config_of(url))
    await store.put_lease("replica", "a", b"value", 30.0)
    assert await store.list_leases("replica") == {"a": b"value"}
    assert (await store.write_journals([BEGIN])).outcomes == [JournalOutcome.WRITTEN]
    assert await store.read_journal("r") == Journal("team", "A", [b"entry"], is_ended=False)
    await store.put_record("prefix", "a", b"")
    assert await blocks.put_blocks(BLOCKS) == [True] * len(BLOCKS)
    assert plain(await blocks.get_blocks(KEYS)) == list(BLOCKS.values())
    await store.close()
    await blocks.close()


async def wait_until_works(blocks: RedisBlocks, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(UnavailableError):
            if all(await blocks.put_blocks(BLOCKS)):
                break
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.1)
    assert plain(await blocks.get_blocks(KEYS)) == list(BLOCKS.values())


async def test_redis_of_an_acl_user_works_with_the_rights_that_are_documented() -> None:
    with RedisServer() as server, client_of(server) as client:
        rights = ("~{sluice*", "~sluice*", "+@all", "-@admin", "-@dangerous")
        client.execute_command("ACL SETUSER", "serving", "on", ">p@ss/w:rd", *rights)
        client.execute_command("ACL SETUSER", "default", "off")
        url = server.url.replace("redis://", "redis://serving:p%40ss%2Fw%3Ard@")
        config = config_of(url, namespace="sluice")
        blocks = RedisBlocks(config)
        assert await blocks.put_blocks(BLOCKS) == [True] * len(BLOCKS)
        assert await blocks.touch_blocks(KEYS, pinned=True) == [True] * len(BLOCKS)
        assert await blocks.flush() == len(BLOCKS)
        await blocks.close()
        store = RedisStore(config)
        await store.put_lease("replica", "a", b"", 30.0)
        assert (await store.write_journals([BEGIN])).outcomes == [JournalOutcome.WRITTEN]
        assert await store.claim_journal("r", "team", "B") is not None
        await store.close()
        other = RedisStore(config_of(url))
        with pytest.raises(UnavailableError) as caught:
            await other.put_lease("replica", "a", b"", 30.0)
        assert "p@ss" not in str(caught.value)
        await other.close()


def certificate(folder: Path) -> tuple[str, str]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subject = ("-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", key, "-out", cert)
    command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "1", "-nodes")
    subprocess.run([*command, *subject, *files], check=True, capture_output=True)
    return cert, key


async def test_redis_with_tls_and_certificates_of_both_sides(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    port = free_port()
    files = ("--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert)
    with RedisServer(("--tls-port", str(port), *files)):
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={cert}"
        await works(f"{url}&ssl_certfile={cert}&ssl_keyfile={key}")
        for bad in (f"{url}", f"rediss://127.0.0.1:{port}/0?ssl_certfile={cert}&ssl_keyfile={key}"):
            blocks = RedisBlocks(config_of(bad))
            with pytest.raises(UnavailableError):  # no certificate of ours, or none that we know
                await blocks.ping()
            await blocks.close()


async def test_redis_behind_a_socket_works(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with RedisServer(("--unixsocket", str(path))):
        await works(f"unix://{path}?db=3")


async def test_redis_sentinel_failover_is_followed() -> None:
    with RedisServer() as master, RedisServer() as replica, client_of(replica) as client:
        client.replicaof("127.0.0.1", master.port)
        silent = await asyncio.start_server(never_answer, "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        with RedisSentinel(master) as sentinel:
            # A sentinel that is gone and one that does not answer are passed over.
            others = f"127.0.0.1:{free_port()},127.0.0.1:{port},127.0.0.1"
            blocks = RedisBlocks(config_of(sentinel.url.replace("127.0.0.1", others, 1)))
            await blocks.ping()
            sentinel.wait_for_replica()
            master.kill()
            with pytest.raises(UnavailableError):
                await blocks.put_blocks(BLOCKS)
            await wait_until_works(blocks)
            await blocks.close()
        silent.close()


async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_redis_cluster_of_one_node_works() -> None:
    with redis_cluster(1) as nodes:
        await works(cluster_url(nodes))


async def test_redis_cluster_spreads_blocks_and_follows_a_slot_that_moves() -> None:
    with redis_cluster(3) as nodes:
        gone = free_port()  # a node that is gone is passed over
        blocks = RedisBlocks(config_of(f"{cluster_url(nodes)},127.0.0.1:{gone}"))
        await blocks.put_blocks(BLOCKS)
        clients = [client_of(node) for node in nodes]
        sizes = [client.dbsize() for client in clients]
        assert all(size > len(BLOCKS) // 6 for size in sizes)
        # The slots of a shard go to another node.
        before = await blocks.has_blocks(KEYS)
        assert all(before)
        clients[0].flushall()  # a node does not give a slot away that it has keys of
        ids = [client.execute_command("CLUSTER MYID") for client in clients]
        for slot in range(1024):  # those of the first shard
            for client in reversed(clients):
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[2])
        for _ in range(2):  # the node that had it says MOVED, the new one has none: both are misses
            found = await blocks.has_blocks(KEYS)
            assert 0 < sum(found) < len(KEYS)
        moved = [key for key, is_there in zip(KEYS, found, strict=True) if not is_there]
        assert await blocks.put_blocks({key: BLOCKS[key] for key in moved}) == [True] * len(moved)
        await wait_until_works(blocks)
        for client in clients:
            client.close()
        await blocks.close()


async def test_redis_cluster_with_a_silent_node_serves_what_the_others_have() -> None:
    with redis_cluster(3) as nodes:
        blocks = RedisBlocks(config_of(cluster_url(nodes), timeout_s=0.4))
        await blocks.put_blocks(BLOCKS, pinned=True)
        os.kill(nodes[0].pid, signal.SIGSTOP)  # the first one, which is asked for slots, too
        start_s = time.monotonic()
        for _ in range(12):
            found = plain(await blocks.get_blocks(KEYS))
            there = [key for key, value in zip(KEYS, found, strict=True) if value is not None]
            assert len(KEYS) // 3 < len(there) < len(KEYS)
            assert all(value in (None, BLOCKS[key]) for key, value in zip(KEYS, found, strict=True))
            expected = [key in there for key in KEYS]
            assert await blocks.has_blocks(KEYS) == expected
            assert await blocks.touch_blocks(KEYS) == expected
            assert await blocks.put_blocks(BLOCKS) == expected
            await blocks.unpin_blocks(KEYS)
            await blocks.ping()
        # Seventy-two calls: a few deadlines until its breaker opens, then one for each probe.
        assert time.monotonic() - start_s < 20 * 0.4
        missing = [key for key in KEYS if key not in there]
        with pytest.raises(UnavailableError):
            await blocks.get_blocks(missing)
        for node in nodes[1:]:
            os.kill(node.pid, signal.SIGSTOP)
        with pytest.raises(UnavailableError):
            await blocks.get_blocks(KEYS)
        for node in nodes:
            os.kill(node.pid, signal.SIGCONT)
        await wait_until_works(blocks)
        await blocks.close()


async def test_redis_cluster_node_without_memory_refuses_its_own_blocks_only() -> None:
    with redis_cluster(3) as nodes, client_of(nodes[1]) as client:
        blocks = RedisBlocks(config_of(cluster_url(nodes)))
        assert await blocks.put_blocks(BLOCKS) == [True] * len(BLOCKS)
        client.config_set("maxmemory", 1)
        stored = await blocks.put_blocks(BLOCKS)
        assert len(KEYS) // 3 < sum(stored) < len(KEYS)
        assert (await blocks.stats()).num_evicted > 0  # what is refused makes room for the next
        refused = {
            key: BLOCKS[key] for key, is_stored in zip(KEYS, stored, strict=True) if not is_stored
        }
        with pytest.raises(UnavailableError, match="OOM"):
            await blocks.put_blocks(refused)
        await blocks.close()


async def test_redis_idle_connections_to_a_former_master_are_closed() -> None:
    with RedisServer() as server, RedisServer() as other:

        async def sentinel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1000):
                writer.write(b"+OK\r\n" * data.count(b"SETINFO"))
                if b"MASTER" in data:
                    port = str(port_of_master)
                    writer.write(f"*2\r\n$9\r\n127.0.0.1\r\n${len(port)}\r\n{port}\r\n".encode())

        port_of_master = server.port
        sentinels = await asyncio.start_server(sentinel, "127.0.0.1", 0)
        port = sentinels.sockets[0].getsockname()[1]
        target = parse_redis_url(f"redis+sentinel://127.0.0.1:{port}/main", "store.url")
        link = RedisLink(target, 5.0, VirtualClock())
        batch = Batch(b"k", [("PING",)])
        await asyncio.gather(*(link.run("ping", batch) for _ in range(8)))
        port_of_master = other.port
        link._route.forget()
        with client_of(server) as client:
            assert len(client.client_list()) > 1
            await link.run("ping", batch)
            assert link._pool.num_idle <= 9  # those to the sentinel, and one
            await wait_for_clients(client, 1)
        await link.close()
        sentinels.close()


async def wait_for_clients(client: redis.Redis, num_clients: int) -> None:
    deadline_s = time.monotonic() + 5.0
    while len(client.client_list()) != num_clients:
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)
