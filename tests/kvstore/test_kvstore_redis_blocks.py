"""What is Redis' own of blocks: real memory, damaged values, lost indexes, other evictors."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
import redis as redis_client
from kvstore_kinds import fresh_keys, fresh_namespace, plain
from redis_server import RedisServer
from redis_topologies import client_of

from cluster.config import StoreConfig
from cluster.kvstore.budget import block_cost
from cluster.kvstore.codec import encode_block
from cluster.kvstore.redis_blocks import RedisBlocks

pytestmark = pytest.mark.integration

MIB = 2**20
KEY, OTHER = fresh_keys(2)


@pytest.fixture
async def blocks(redis_server: RedisServer) -> AsyncIterator[RedisBlocks]:
    config = StoreConfig(
        url=redis_server.url, namespace=fresh_namespace(), timeout_s=5.0, max_bytes=MIB
    )
    blocks = RedisBlocks(config)
    yield blocks
    await blocks.close()


@pytest.fixture
def raw(redis_server: RedisServer) -> redis_client.Redis:
    return client_of(redis_server)


def name_of(blocks: RedisBlocks, rest: str) -> bytes:
    return f"{{{blocks._config.namespace}:s00}}:v2:{rest}".encode()


@pytest.mark.parametrize(("size", "num_mib"), [(300, 4), (40_000, 24), (200_000, 48)])
async def test_redis_memory_stays_within_the_budget_under_ten_times_its_volume(
    size: int, num_mib: int
) -> None:
    max_bytes = num_mib * MIB  # beside which 0.5 MiB of scripts and a client's buffers are little
    hot = {key: bytes(size) for key in fresh_keys(max_bytes // block_cost(size) // 10, seed=2)}
    chance = random.Random(size)
    with RedisServer() as server, client_of(server) as client:
        empty_bytes = client.info("memory")["used_memory"]
        blocks = RedisBlocks(StoreConfig(url=server.url, timeout_s=10.0, max_bytes=max_bytes))
        await blocks.put_blocks(hot)
        await blocks.touch_blocks(list(hot))
        payload = chance.randbytes(size)
        num_bytes = num_hits = num_reads = 0
        while num_bytes < 10 * max_bytes:
            num = max(1, max_bytes // 32 // block_cost(size))
            batch = {b"model...01" + chance.randbytes(16): payload for _ in range(num)}
            assert await blocks.put_blocks(batch) == [True] * num
            num_bytes += num * block_cost(size)
            read = await blocks.get_blocks(chance.sample(list(hot), max(1, len(hot) // 8)))
            num_hits += sum(value is not None for value in read.values)
            num_reads += len(read.values)
            used_bytes = client.info("memory")["used_memory"] - empty_bytes
            assert used_bytes <= 1.02 * max_bytes
        assert num_hits >= 0.95 * num_reads
        assert used_bytes >= 0.85 * max_bytes  # what is paid for is used
        await blocks.close()


async def test_redis_damaged_or_misplaced_block_is_a_miss(
    blocks: RedisBlocks, raw: redis_client.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await blocks.put_blocks({KEY: b"payload", OTHER: b"other"})
    name = name_of(blocks, "block:") + KEY
    data = raw.get(name)
    assert data == encode_block(b"payload", KEY)
    monkeypatch.setattr("cluster.kvstore.codec.VERSION", 2)
    newer = encode_block(b"payload", KEY)
    monkeypatch.undo()
    another_model = encode_block(b"payload", b"other mode" + KEY[10:])
    swapped = raw.get(name_of(blocks, "block:") + OTHER)
    for bad in (data[:-1], data[:-1] + b"x", b"", b"payload", swapped, newer, another_model):
        raw.set(name, bad)
        fetched = await blocks.get_blocks([KEY, OTHER])
        assert plain(fetched) == [None, b"other"]
        assert fetched.num_corrupt == 1
    await blocks.put_blocks({KEY: b"payload"})
    assert plain(await blocks.get_blocks([KEY])) == [b"payload"]


async def test_redis_books_are_what_is_stored(blocks: RedisBlocks, raw: redis_client.Redis) -> None:
    keys = fresh_keys(30)
    for i in range(90):
        key = keys[i * 7 % 30]
        await blocks.put_blocks({key: bytes(1000 * (i % 30 + 1))}, pinned=i % 5 == 0)
        await blocks.touch_blocks([keys[i * 11 % 30]], pinned=i % 13 == 0)
    prefix = name_of(blocks, "block:")
    stored = {name.removeprefix(prefix): raw.strlen(name) for name in raw.keys(prefix + b"*")}
    entries = raw.hgetall(name_of(blocks, "books"))
    used, held, *_ = entries.pop(b"").split()
    order, pinned = (set(raw.zrange(name_of(blocks, rest), 0, -1)) for rest in ("order", "pinned"))
    assert pinned and order and not order & pinned
    assert set(entries) == order | pinned == set(stored)
    costs = {key: int.from_bytes(entry[:4], "big") for key, entry in entries.items()}
    frame_bytes = len(encode_block(b"", KEY))
    assert costs == {key: block_cost(size - frame_bytes) for key, size in stored.items()}
    assert int(used) == sum(costs.values()) <= MIB
    assert int(held) == sum(costs[key] for key in pinned) <= MIB // 2
    assert all(raw.pttl(name_of(blocks, "block:") + key) > 0 for key in stored)


async def test_redis_nothing_of_blocks_lasts_for_ever(
    blocks: RedisBlocks, raw: redis_client.Redis
) -> None:
    await blocks.put_blocks({KEY: b"payload", OTHER: b"other"})
    await blocks.touch_blocks([KEY], pinned=True)
    names = raw.keys(name_of(blocks, "*"))
    assert len(names) == 5
    assert all(raw.pttl(name) > 0 for name in names)
    raw.delete(name_of(blocks, "order"))
    await blocks.put_blocks(dict.fromkeys(fresh_keys(600, seed=1), b""))
    raw.delete(name_of(blocks, "order"))
    await blocks.touch_blocks([KEY])
    names = raw.keys(name_of(blocks, "*"))
    assert any(b":graves" in name for name in names)
    assert all(raw.pttl(name) > 0 for name in names)


async def test_redis_pinned_blocks_of_a_chain_are_ranked_from_its_head(
    blocks: RedisBlocks,
) -> None:
    chain = fresh_keys(120)
    for start in (80, 40, 0):
        piece = dict.fromkeys(chain[start : start + 40], b"")
        await blocks.put_blocks(piece, pinned=True, position=start)
    await blocks.touch_blocks(chain, pinned=True)
    assert await blocks.hottest(b"", 200) == chain


@pytest.mark.parametrize("lost", ["order", "pinned", "books", "all three"])
async def test_redis_lost_index_heals(
    blocks: RedisBlocks, raw: redis_client.Redis, lost: str
) -> None:
    old = fresh_keys(6, seed=1)
    await blocks.put_blocks(dict.fromkeys(old, bytes(100_000)))
    await blocks.touch_blocks(old[:2], pinned=True)
    rests = ("order", "pinned", "books")
    raw.delete(*(name_of(blocks, rest) for rest in (rests if lost == "all three" else (lost,))))
    if lost == "all three":  # what is asked for comes back to the books
        assert await blocks.touch_blocks(old) == [True] * 6
        assert (await blocks.stats()).num_blocks == 6
    keys = fresh_keys(30)
    for key in keys:
        assert await blocks.put_blocks({key: bytes(100_000)}) == [True]
        names = raw.keys(name_of(blocks, "block:*"))
        assert sum(map(raw.strlen, names)) <= MIB
    assert (await blocks.has_blocks(keys))[-5:] == [True] * 5
    assert (await blocks.stats()).used_bytes <= MIB


async def test_redis_shard_that_lost_an_index_is_dropped_bit_by_bit(
    redis_server: RedisServer, raw: redis_client.Redis
) -> None:
    config = StoreConfig(
        url=redis_server.url, namespace=fresh_namespace(), timeout_s=5.0, max_bytes=16 * MIB
    )
    blocks = RedisBlocks(config)
    keys = fresh_keys(4000, seed=1)
    for start in range(0, 4000, 1000):
        await blocks.put_blocks(dict.fromkeys(keys[start : start + 1000], b"x"))
    raw.delete(name_of(blocks, "order"))
    hot, num_left = keys[:20], [4000]
    while num_left[-1] > len(hot):
        assert await blocks.touch_blocks(hot) == [True] * 20  # they come back to the books
        num_left.append(len(raw.keys(name_of(blocks, "block:*"))))
        assert 0 < num_left[-2] - num_left[-1] <= 512
    assert raw.keys(name_of(blocks, "graves*")) == []
    assert (await blocks.stats()).num_blocks == 20
    await blocks.close()


@pytest.mark.parametrize("index", ["order", "pinned", "books", "graves"])
async def test_redis_index_of_another_type_is_as_absent(
    blocks: RedisBlocks, raw: redis_client.Redis, index: str
) -> None:
    await blocks.put_blocks({KEY: b"payload"}, pinned=True)
    await blocks.put_blocks({OTHER: b"other"})
    calls = (
        lambda: blocks.stats(),
        lambda: blocks.touch_blocks([KEY]),
        lambda: blocks.put_blocks({KEY: b"payload"}),
        lambda: blocks.get_blocks([KEY]),
        lambda: blocks.unpin_blocks([KEY]),
        lambda: blocks.flush(),
    )
    for call in calls:
        raw.delete(name_of(blocks, index))
        raw.set(name_of(blocks, index), "nonsense")
        await call()
    assert await blocks.put_blocks({KEY: b"payload"}) == [True]
    assert plain(await blocks.get_blocks([KEY])) == [b"payload"]


@pytest.mark.parametrize("entry", [b"", b"short", b"much too long"])
@pytest.mark.parametrize("field", ["sums", "block"])
async def test_redis_entry_that_cannot_be_read_is_as_absent(
    blocks: RedisBlocks, raw: redis_client.Redis, field: str, entry: bytes
) -> None:
    names = [name_of(blocks, "block:") + key for key in (KEY, OTHER)]
    for pinned in (False, True):
        await blocks.put_blocks({KEY: b"payload", OTHER: b"other"}, pinned=pinned)
        for call in (blocks.touch_blocks, blocks.unpin_blocks, blocks.get_blocks):
            raw.hset(name_of(blocks, "books"), KEY if field == "block" else b"", entry)
            await call([KEY])
        raw.hset(name_of(blocks, "books"), KEY if field == "block" else b"", entry)
        assert await blocks.put_blocks({KEY: b"again"}) == [True]
        assert plain(await blocks.get_blocks([KEY])) == [b"again"]
        raw.hset(name_of(blocks, "books"), KEY if field == "block" else b"", entry)
        assert await blocks.flush() >= 1
        assert not raw.exists(*names)
        assert (await blocks.stats()).used_bytes == 0


@pytest.mark.parametrize("lost", ["order", "pinned", "books"])
async def test_redis_flush_finds_what_an_index_has_lost(
    blocks: RedisBlocks, raw: redis_client.Redis, lost: str
) -> None:
    await blocks.put_blocks(dict.fromkeys(fresh_keys(300), b"payload"), pinned=True)
    await blocks.put_blocks(dict.fromkeys(fresh_keys(300, seed=2), b"payload"))
    raw.delete(name_of(blocks, lost))
    await blocks.flush()
    assert raw.keys(name_of(blocks, "*")) == []


async def test_redis_sums_that_are_lost_are_not_taken_for_none(
    blocks: RedisBlocks, raw: redis_client.Redis
) -> None:
    await blocks.put_blocks(dict.fromkeys(fresh_keys(9), bytes(100_000)))
    raw.hdel(name_of(blocks, "books"), b"")
    assert await blocks.put_blocks({KEY: b"payload"}) == [True]
    assert (await blocks.stats()).used_bytes == block_cost(7)
    assert raw.keys(name_of(blocks, "block:*")) == [name_of(blocks, "block:") + KEY]


async def test_redis_value_of_another_type_costs_nothing_else(
    blocks: RedisBlocks, raw: redis_client.Redis
) -> None:
    raw.rpush(name_of(blocks, "block:") + KEY, "an entry")
    assert plain(await blocks.get_blocks([KEY])) == [None]
    await blocks.touch_blocks([KEY])
    assert await blocks.put_blocks({KEY: b"payload"}) == [True]
    assert plain(await blocks.get_blocks([KEY])) == [b"payload"]


async def test_redis_blocks_that_redis_itself_evicted_leave_the_books(
    blocks: RedisBlocks, raw: redis_client.Redis
) -> None:
    keys = fresh_keys(5)
    await blocks.put_blocks(dict.fromkeys(keys, bytes(1000)), pinned=True)
    await blocks.put_blocks({OTHER: bytes(1000)})
    raw.delete(*(name_of(blocks, "block:") + key for key in (*keys[:2], OTHER)))
    assert await blocks.touch_blocks([*keys, OTHER]) == [False] * 2 + [True] * 3 + [False]
    stats = await blocks.stats()
    assert (stats.num_blocks, stats.num_pinned) == (3, 3)
    assert stats.used_bytes == 3 * block_cost(1000)


async def test_redis_that_evicts_by_itself_is_no_harm() -> None:
    limit = ("--maxmemory", "12mb", "--maxmemory-policy", "allkeys-random")
    with RedisServer(limit) as server:
        config = StoreConfig(url=server.url, timeout_s=5.0, max_bytes=64 * MIB)
        blocks = RedisBlocks(config)
        keys = fresh_keys(600)
        for start in range(0, 600, 10):
            batch = dict.fromkeys(keys[start : start + 10], bytes(50_000))
            await blocks.put_blocks(batch, pinned=start % 100 == 0)
            await blocks.touch_blocks(keys[: start + 10])
        found = plain(await blocks.get_blocks(keys))
        # An index goes as easily as a block, and takes along what it knew.
        assert set(found) <= {None, bytes(50_000)}
        await blocks.flush()
        assert (await blocks.stats()).used_bytes == 0
        assert await blocks.put_blocks({KEY: b"payload"}) == [True]
        assert plain(await blocks.get_blocks([KEY])) == [b"payload"]
        await blocks.close()


async def test_redis_flushed_loses_the_past_only() -> None:
    with RedisServer() as server, client_of(server) as client:
        blocks = RedisBlocks(StoreConfig(url=server.url, timeout_s=5.0))
        await blocks.put_blocks({KEY: b"payload"}, pinned=True)
        client.flushall()
        client.script_flush()
        assert plain(await blocks.get_blocks([KEY])) == [None]
        assert (await blocks.stats()).num_blocks == 0
        assert await blocks.put_blocks({KEY: b"payload"}) == [True]
        assert plain(await blocks.get_blocks([KEY])) == [b"payload"]
        await blocks.close()


async def test_redis_reads_travel_in_chunks(
    redis_server: RedisServer, raw: redis_client.Redis
) -> None:
    config = StoreConfig(
        url=redis_server.url, namespace=fresh_namespace(), timeout_s=5.0, kv_chunk_bytes=2**16
    )
    blocks = RedisBlocks(config)
    keys = fresh_keys(20)
    await blocks.put_blocks(dict.fromkeys(keys, bytes(20_000)))
    before = num_calls(raw, "mget")
    await blocks.get_blocks(keys)
    assert num_calls(raw, "mget") - before == 7  # three in each
    await blocks.close()


async def test_redis_writes_and_counts_in_one_transaction(
    blocks: RedisBlocks, raw: redis_client.Redis
) -> None:
    before = {name: num_calls(raw, name) for name in ("set", "eval", "exec")}
    await blocks.put_blocks({KEY: b"payload", OTHER: b"other"})
    assert [num_calls(raw, name) - count for name, count in before.items()] == [2, 1, 1]


def num_calls(raw: redis_client.Redis, command: str) -> int:
    return int(raw.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])
