"""Ways to Redis: TLS, ACL, a socket's path, a failover, a cluster that changes."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from kvstore_kinds import fresh_keys, fresh_namespace, plain
from redis_server import RedisServer, free_port
from redis_topologies import RedisSentinel, client_of, cluster_url, redis_cluster

from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.kvstore.redis_blocks import RedisBlocks
from cluster.kvstore.redis_store import RedisStore

pytestmark = pytest.mark.integration

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
    assert await store.append_journal("r", [b"entry"]) == 1
    await store.put_record("prefix", "a", b"")
    assert await blocks.put_blocks(BLOCKS) == [True] * len(BLOCKS)
    assert plain(await blocks.get_blocks(KEYS)) == list(BLOCKS.values())
    await store.close()
    await blocks.close()


async def wait_until_works(blocks: RedisBlocks, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            assert await blocks.put_blocks(BLOCKS) == [True] * len(BLOCKS)
            assert plain(await blocks.get_blocks(KEYS)) == list(BLOCKS.values())
            return
        except UnavailableError:
            assert time.monotonic() < deadline_s
        await asyncio.sleep(0.1)


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
        assert await store.append_journal("r", [b"entry"]) == 1
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
        with pytest.raises(UnavailableError, match="MOVED"):
            await blocks.has_blocks(KEYS)
        found = await blocks.has_blocks(KEYS)
        assert 0 < sum(found) < len(KEYS)  # what was not moved with its slot is a miss
        await wait_until_works(blocks)
        for client in clients:
            client.close()
        await blocks.close()
