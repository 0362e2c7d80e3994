"""What is Redis' own of journals: exact books, lost and damaged keys, real memory."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
import redis as redis_client
from kvstore_kinds import fresh_namespace
from plain_journals import ENTRY_BYTES, JOURNAL_BYTES, PlainJournals
from redis.crc import key_slot
from redis_server import RedisServer
from redis_topologies import client_of

from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.kvstore.redis_store import RedisStore
from cluster.kvstore.store import Journal, JournalOutcome, JournalWrite, JournalWrites

pytestmark = pytest.mark.integration

MIB = 2**20
BUDGET_BYTES = 2**16
WRITTEN, GONE = JournalOutcome.WRITTEN, JournalOutcome.GONE


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    config = StoreConfig(
        url=redis_server.url,
        namespace=fresh_namespace(),
        timeout_s=5.0,
        journal_bytes=BUDGET_BYTES,
    )
    store = RedisStore(config)
    yield store
    await store.close()


@pytest.fixture
def raw(redis_server: RedisServer) -> redis_client.Redis:
    return client_of(redis_server)


def name_of(store: RedisStore, rest: str) -> str:
    return f"{{{store._config.namespace}}}:v2:{rest}"


def begin(key: str, *entries: bytes) -> JournalWrite:
    return JournalWrite(key, "team", "A", entries, begins=True)


def append(key: str, *entries: bytes) -> JournalWrite:
    return JournalWrite(key, "team", "A", entries)


def end(key: str) -> JournalWrite:
    return JournalWrite(key, "team", "A", (), ends=True)


def costs_of(store: RedisStore, raw: redis_client.Redis) -> dict[str, int]:
    """Return the books, after a look whether they agree with each other and the journals."""
    books = raw.hgetall(name_of(store, "journals:books"))
    used, touch = map(int, books.pop(b"").split())
    places = dict(raw.zrange(name_of(store, "journals:order"), 0, -1, withscores=True))
    assert books.keys() == places.keys()
    assert used == sum(map(int, books.values())) <= BUDGET_BYTES
    assert all(place % 2**52 <= touch for place in places.values())
    for key, cost in books.items():
        items = raw.lrange(name_of(store, f"journal:{key.decode()}"), 0, -1)
        if items:  # else it has expired
            _, _, state, *entries = items
            sizes = sum(len(entry) + ENTRY_BYTES for entry in entries)
            assert int(cost) == JOURNAL_BYTES + sizes
            assert (state == b"ended") == (places[key] < 2**52)
    return {key.decode(): int(cost) for key, cost in books.items()}


async def test_redis_journals_end_with_their_books_on_one_node(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    await store.write_journals([begin("r", b"entry"), begin("{other}", b"entry")])
    names = raw.keys(f"*{store._config.namespace}*")
    assert len(names) == 4
    assert len({key_slot(name) for name in names}) == 1
    ttl_ms = store._config.journal_ttl_s * 1000
    assert all(ttl_ms - 10_000 < raw.pttl(name) <= ttl_ms for name in names)


@pytest.mark.parametrize("seed", range(4))
async def test_redis_journals_are_those_of_the_model_after_any_history(
    store: RedisStore, raw: redis_client.Redis, seed: int
) -> None:
    chance = random.Random(seed)
    model = PlainJournals(BUDGET_BYTES, store._config.journal_ttl_s)
    for now_s in range(150):
        key, scope, owner = (chance.choice(names) for names in ("uvwxyz", "aaaaab", "AB"))
        writes = [
            JournalWrite(
                chance.choice("uvwxyz"),
                chance.choice("aaaaab"),
                chance.choice("AAB"),
                tuple(bytes(chance.choice([0, 9000, 20_000])) for _ in range(chance.randrange(3))),
                begins=chance.random() < 0.4,
                ends=chance.random() < 0.2,
            )
            for _ in range(chance.randrange(1, 5))
        ]
        assert await store.write_journals(writes) == model.write(writes, 0.0), now_s
        expected = model.claim(key, scope, owner, 0.0)
        assert await store.claim_journal(key, scope, owner) == expected
        expired = model.oldest(is_ended=chance.random() < 0.5)
        if expired is not None and chance.random() < 0.2:
            raw.delete(name_of(store, f"journal:{expired}"))
            model.expire(expired)
        for name in "uvwxyz":
            assert await store.read_journal(name) == model.read(name, 0.0)
        costs = costs_of(store, raw)
        assert {row.key: row.cost_bytes for row in model.rows}.items() <= costs.items()


async def test_redis_journals_that_expired_leave_the_books_bit_by_bit(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    for kind in ("live", "ended"):
        writes = [begin(f"{kind}{number}") for number in range(40)]
        writes += [end(write.key) for write in writes if kind == "ended"]
        await store.write_journals(writes)
    for name in raw.keys(name_of(store, "journal:*")):
        raw.delete(name)
    assert len(costs_of(store, raw)) == 80
    await store.write_journals([begin("new", b"entry")])
    assert costs_of(store, raw) == {"new": JOURNAL_BYTES + ENTRY_BYTES + 5}


async def test_redis_sweep_of_expired_journals_is_bounded(
    redis_server: RedisServer, raw: redis_client.Redis
) -> None:
    config = StoreConfig(url=redis_server.url, namespace=fresh_namespace(), timeout_s=5.0)
    store = RedisStore(config)
    await store.write_journals([begin(f"{number}") for number in range(200)])
    for number in range(200):
        raw.delete(name_of(store, f"journal:{number}"))
    left = []
    for _ in range(4):
        await store.write_journals([append("none")])
        left.append(raw.zcard(name_of(store, "journals:order")))
    assert left == [136, 72, 8, 0]
    await store.close()


async def test_redis_journal_that_vanished_makes_room_and_is_not_counted_as_dropped(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    await store.write_journals([begin(key, bytes(15_000)) for key in "abcd"])
    raw.delete(name_of(store, "journal:b"), name_of(store, "journal:d"))
    assert (await store.write_journals([append("b"), append("d")])).outcomes == [GONE, GONE]
    written = await store.write_journals([begin("d", bytes(15_000)), begin("e", bytes(30_000))])
    assert written == JournalWrites([WRITTEN, WRITTEN], 0, 1)
    assert costs_of(store, raw).keys() == {"c", "d", "e"}


@pytest.mark.parametrize("lost", ["journals:order", "journals:books"])
@pytest.mark.parametrize("is_replaced", [False, True])
async def test_redis_journals_come_back_to_books_that_were_lost(
    store: RedisStore, raw: redis_client.Redis, lost: str, is_replaced: bool
) -> None:
    await store.write_journals([begin(key, bytes(9000)) for key in "abc"])
    before = costs_of(store, raw)
    raw.delete(name_of(store, lost))
    if is_replaced:
        raw.set(name_of(store, lost), b"somebody else's")
    claimed = await store.claim_journal("a", "team", "A")
    assert claimed == Journal("team", "A", [bytes(9000)], is_ended=False)
    assert costs_of(store, raw) == {}
    writes = [append("a"), append("b", b"more"), end("b")]
    assert await store.write_journals(writes) == JournalWrites([WRITTEN] * 3)
    assert costs_of(store, raw) == {"a": before["a"], "b": before["b"] + ENTRY_BYTES + 4}
    assert await store.read_journal("c") is not None
    assert 0 < raw.ttl(name_of(store, "journal:c")) <= store._config.journal_ttl_s
    await store.write_journals([begin("c")])
    assert costs_of(store, raw)["c"] == JOURNAL_BYTES


@pytest.mark.parametrize("sums", [b"", b"no number", b"-5 1", b"999999 1"])
async def test_redis_journals_are_written_whatever_the_sums_say(
    store: RedisStore, raw: redis_client.Redis, sums: bytes
) -> None:
    await store.write_journals([begin("a", bytes(9000))])
    raw.hset(name_of(store, "journals:books"), "", sums)
    assert (await store.write_journals([append("a", b"x")])).outcomes == [WRITTEN]
    assert costs_of(store, raw) == {"a": JOURNAL_BYTES + 2 * ENTRY_BYTES + 9001}


async def test_redis_journal_of_another_type_is_replaced_and_hurts_no_other(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    raw.set(name_of(store, "journal:text"), b"no list")
    raw.rpush(name_of(store, "journal:short"), b"team", b"A")
    with pytest.raises(UnavailableError, match="read_journal"):
        await store.read_journal("text")
    assert await store.read_journal("short") is None
    writes = [begin("a"), append("text"), append("short"), begin("text", b"x"), begin("short")]
    outcomes = (await store.write_journals(writes)).outcomes
    assert outcomes == [WRITTEN, GONE, GONE, WRITTEN, WRITTEN]
    assert await store.read_journal("text") == Journal("team", "A", [b"x"], is_ended=False)
    assert await store.read_journal("short") == Journal("team", "A", [], is_ended=False)
    assert costs_of(store, raw).keys() == {"a", "text", "short"}


async def test_redis_journals_make_room_in_their_order_though_clocks_go_back(
    store: RedisStore, raw: redis_client.Redis
) -> None:
    await store.write_journals([begin("z", bytes(20_000))])
    used, touch = raw.hget(name_of(store, "journals:books"), "").split()
    ahead = int(touch) + 10**12  # another master's clock was twelve days ahead
    raw.zadd(name_of(store, "journals:order"), {"z": 2**52 + ahead})
    raw.hset(name_of(store, "journals:books"), "", b"%d %d" % (int(used), ahead))
    for key in "yx":
        await store.write_journals([begin(key, bytes(20_000))])
    assert await store.write_journals([begin("w", bytes(20_000))]) == JournalWrites([WRITTEN], 0, 1)
    assert costs_of(store, raw).keys() == {"w", "x", "y"}


@pytest.mark.parametrize(("size", "num_entries"), [(300, 1), (300, 40), (20_000, 2)])
async def test_redis_memory_of_journals_stays_within_the_budget(
    size: int, num_entries: int
) -> None:
    budget_bytes = 2 * MIB
    with RedisServer() as server, client_of(server) as client:
        empty_bytes = client.info("memory")["used_memory"]
        store = RedisStore(StoreConfig(url=server.url, timeout_s=10.0, journal_bytes=budget_bytes))
        cost_bytes = JOURNAL_BYTES + num_entries * (size + ENTRY_BYTES)
        num_dropped = 0
        for start in range(0, 5 * budget_bytes // cost_bytes, 16):
            keys = [f"{number:036}" for number in range(start, start + 16)]
            writes = [begin(key) for key in keys]
            writes += [append(key, bytes(size)) for _ in range(num_entries) for key in keys]
            num_dropped += (await store.write_journals(writes)).num_dropped_live
        used_bytes = client.info("memory")["used_memory"] - empty_bytes
        await store.close()
    assert num_dropped == pytest.approx(4 * budget_bytes / cost_bytes, abs=16)
    # From 8 KiB on the allocator rounds by a quarter at most; scripts and buffers come on top.
    assert used_bytes < (1.25 if size > 8000 else 1.05) * budget_bytes + MIB // 2


async def test_redis_without_memory_refuses_journals_and_keeps_the_books() -> None:
    with RedisServer() as server, client_of(server) as client:
        store = RedisStore(StoreConfig(url=server.url, timeout_s=5.0, journal_bytes=BUDGET_BYTES))
        await store.write_journals([begin("a", b"one")])
        before = costs_of(store, client)
        client.config_set("maxmemory", 1)
        for writes in ([append("a", b"two")], [begin("b")], [append("b"), end("a")]):
            with pytest.raises(UnavailableError, match="OOM"):
                await store.write_journals(writes)
        assert await store.read_journal("a") == Journal("team", "A", [b"one"], is_ended=False)
        other = RedisStore(StoreConfig(url=server.url, timeout_s=5.0, namespace="other"))
        with pytest.raises(UnavailableError, match="OOM"):
            await other.write_journals([begin("first")])
        await other.close()
        client.config_set("maxmemory", 0)
        assert costs_of(store, client) == before
        assert (await store.write_journals([append("a", b"two")])).outcomes == [WRITTEN]
        await store.close()
