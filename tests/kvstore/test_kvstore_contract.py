"""What every store does: the embedded one, Redis, and the embedded one behind a Ray actor."""

from __future__ import annotations

import asyncio
import random

from kvstore_kinds import Kind

from cluster.kvstore.budget import block_cost
from cluster.kvstore.store import Store

BUDGET_BYTES = 2**20
TTL_S = 0.8  # two sleeps of 0.6 of it pass it, one leaves a busy machine 0.3 s


async def test_lease_is_listed_by_key_until_it_is_dropped(kind: Kind) -> None:
    store = await kind.open()
    for key in ("b", "a:1", "c"):
        await store.put_lease("replica", key, key.encode() * 2, 30.0)
    await store.put_lease("gateway", "a", b"\x00\xff", 30.0)
    await store.put_lease("replica", "c", b"", 30.0)
    assert list((await store.list_leases("replica")).items()) == [
        ("a:1", b"a:1a:1"),
        ("b", b"bb"),
        ("c", b""),
    ]
    await store.drop_lease("replica", "b")
    await store.drop_lease("replica", "never there")
    assert list(await store.list_leases("replica")) == ["a:1", "c"]
    assert await store.list_leases("gateway") == {"a": b"\x00\xff"}
    assert await store.list_leases("other") == {}


async def test_lease_ends_when_it_is_not_renewed(kind: Kind) -> None:
    store = await kind.open()
    await store.put_lease("replica", "lasting", b"", 30.0)
    await store.put_lease("replica", "silent", b"", TTL_S)
    await store.put_lease("replica", "renewed", b"old", TTL_S)
    await kind.elapse(0.6 * TTL_S)
    await store.put_lease("replica", "renewed", b"new", TTL_S)
    await kind.elapse(0.6 * TTL_S)
    assert await store.list_leases("replica") == {"lasting": b"", "renewed": b"new"}
    await kind.elapse(0.6 * TTL_S)
    assert await store.list_leases("replica") == {"lasting": b""}


async def test_lease_that_is_shortened_ends_earlier(kind: Kind) -> None:
    store = await kind.open()
    await store.put_lease("replica", "a", b"", 30.0)
    await store.put_lease("replica", "a", b"", 0.05)
    await kind.elapse(0.1)
    assert await store.list_leases("replica") == {}


async def test_blocks_come_back_bit_exact(kind: Kind) -> None:
    store = await kind.open()
    chance = random.Random(7)
    blocks = {chance.randbytes(16): chance.randbytes(n) for n in (0, 1, 63, 4096, 2**20)}
    blocks[bytes(16)] = b"\r\n\x00*1\r\n"
    assert await store.put_blocks(blocks) == len(blocks)
    keys = [*blocks, b"absent".ljust(16)]
    assert await store.get_blocks(keys) == [*blocks.values(), None]
    assert await store.has_blocks(keys) == [True] * len(blocks) + [False]
    twice = [keys[0], keys[-1], keys[0]]
    assert await store.get_blocks(twice) == [blocks[keys[0]], None, blocks[keys[0]]]


async def test_blocks_of_an_empty_batch_are_fine(kind: Kind) -> None:
    store = await kind.open()
    assert await store.put_blocks({}) == 0
    assert await store.get_blocks([]) == []
    assert await store.has_blocks([]) == []


async def test_blocks_written_again_are_replaced_and_counted_once(kind: Kind) -> None:
    store = await kind.open(max_bytes=BUDGET_BYTES)
    half = BUDGET_BYTES // 2 - 1024
    await store.put_blocks({b"other".ljust(16): bytes(half)})
    for byte in (b"a", b"b", b"c"):
        assert await store.put_blocks({b"same".ljust(16): byte * half}) == 1
    both = await store.get_blocks([b"other".ljust(16), b"same".ljust(16)])
    assert both == [bytes(half), b"c" * half]


async def test_blocks_end_a_ttl_after_their_write(kind: Kind) -> None:
    store = await kind.open(kv_ttl_s=TTL_S, max_bytes=BUDGET_BYTES)
    first, second = b"1".ljust(16), b"2".ljust(16)
    await store.put_blocks({first: bytes(400_000)})
    await kind.elapse(0.6 * TTL_S)
    await store.get_blocks([first])  # a read does not renew
    await store.put_blocks({second: bytes(400_000)})
    await kind.elapse(0.6 * TTL_S)
    assert await store.has_blocks([first, second]) == [False, True]
    assert await store.get_blocks([first]) == [None]
    # The room of the ended block is free again: nothing live is evicted for the next one.
    await store.put_blocks({first: bytes(400_000)})
    assert await store.has_blocks([first, second]) == [True, True]


async def test_blocks_budget_holds_under_ten_times_its_volume(kind: Kind) -> None:
    store = await kind.open(max_bytes=BUDGET_BYTES)
    chance = random.Random(11)
    hot = {f"hot-{i}".encode().ljust(16): chance.randbytes(20_000) for i in range(4)}
    await store.put_blocks(hot)
    written: dict[bytes, bytes] = dict(hot)
    num_bytes = 0
    while num_bytes < 10 * BUDGET_BYTES:
        batch = {chance.randbytes(16): chance.randbytes(chance.randrange(60_000)) for _ in range(8)}
        assert await store.put_blocks(batch) == len(batch)
        assert await store.get_blocks(list(batch)) == list(batch.values())
        assert await store.get_blocks(list(hot)) == list(hot.values())
        written |= batch
        num_bytes += sum(map(len, batch.values()))
        assert await _used_bytes(store, written) <= BUDGET_BYTES
    # Most of the budget is in use, too: at the most one batch's largest block is missing to it.
    assert await _used_bytes(store, written) > BUDGET_BYTES - 60_000 - 256


async def test_blocks_least_recently_used_make_room_first(kind: Kind) -> None:
    store = await kind.open(max_bytes=BUDGET_BYTES)
    third = (BUDGET_BYTES - 4096) // 3
    a, b, c, d, e = (name.encode().ljust(16) for name in "abcde")
    await store.put_blocks({b: bytes(third), a: bytes(third), c: bytes(third)})
    await store.get_blocks([b])
    await store.has_blocks([a])  # does not count as a use
    await store.put_blocks({d: bytes(third)})
    assert await store.has_blocks([a, b, c, d]) == [False, True, True, True]
    await store.put_blocks({e: bytes(third)})
    assert await store.has_blocks([a, b, c, d, e]) == [False, True, False, True, True]


async def test_blocks_of_one_batch_make_room_in_their_order(kind: Kind) -> None:
    store = await kind.open(max_bytes=BUDGET_BYTES)
    third = (BUDGET_BYTES - 4096) // 3
    a, b, c, d = (name.encode().ljust(16) for name in "abcd")
    await store.put_blocks({c: bytes(third), b: bytes(third), a: bytes(third)})
    await store.put_blocks({d: bytes(third)})
    assert await store.has_blocks([c, b, a, d]) == [False, True, True, True]


async def test_blocks_of_a_batch_beyond_the_budget_leave_the_last_ones(kind: Kind) -> None:
    store = await kind.open(max_bytes=BUDGET_BYTES)
    batch = {f"{i:02}".encode().ljust(16): bytes(100_000) for i in range(25)}
    batch[b"too large".ljust(16)] = bytes(BUDGET_BYTES)
    assert await store.put_blocks(batch) == 10
    assert await store.has_blocks(list(batch)) == [False] * 15 + [True] * 10 + [False]


async def test_journal_is_read_from_any_index(kind: Kind) -> None:
    store = await kind.open()
    assert await store.append_journal("request", [b"one", b"", b"\x00"]) == 3
    assert await store.append_journal("request", []) == 3
    assert await store.append_journal("request", [b"four"]) == 4
    assert await store.append_journal("other", []) == 0
    assert await store.read_journal("request") == [b"one", b"", b"\x00", b"four"]
    assert await store.read_journal("request", 2) == [b"\x00", b"four"]
    assert await store.read_journal("request", 4) == []
    assert await store.read_journal("other") == []
    await store.drop_journal("request")
    await store.drop_journal("request")
    assert await store.read_journal("request") == []
    assert await store.append_journal("request", [b"again"]) == 1


async def test_journal_ends_a_ttl_after_its_last_append(kind: Kind) -> None:
    store = await kind.open(journal_ttl_s=TTL_S)
    await store.append_journal("silent", [b"a"])
    await store.append_journal("renewed", [b"a"])
    await kind.elapse(0.6 * TTL_S)
    await store.append_journal("renewed", [b"b"])
    await kind.elapse(0.6 * TTL_S)
    assert await store.read_journal("silent") == []
    assert await store.read_journal("renewed") == [b"a", b"b"]
    await kind.elapse(0.6 * TTL_S)
    assert await store.append_journal("renewed", [b"c"]) == 1


async def test_journal_appends_of_many_writers_are_all_there(kind: Kind) -> None:
    store = await kind.open()
    entries = [f"{i}".encode() for i in range(100)]
    lengths = await asyncio.gather(*(store.append_journal("r", [e, e]) for e in entries))
    assert sorted(lengths) == list(range(2, 201, 2))
    read = await store.read_journal("r")
    assert read[::2] == read[1::2]
    assert sorted(read[::2]) == sorted(entries)


async def test_namespaces_do_not_see_each_other(kind: Kind) -> None:
    left, right = await kind.open(), await kind.open()
    key = bytes(16)
    await left.put_lease("replica", "a", b"", 30.0)
    await left.put_blocks({key: b"left"})
    await left.append_journal("r", [b"left"])
    assert await right.list_leases("replica") == {}
    assert await right.get_blocks([key]) == [None]
    assert await right.read_journal("r") == []
    await right.put_blocks({key: b"right"})
    assert await left.get_blocks([key]) == [b"left"]


async def _used_bytes(store: Store, written: dict[bytes, bytes]) -> int:
    present = await store.has_blocks(list(written))
    values = zip(written.values(), present, strict=True)
    return sum(block_cost(value) for value, is_present in values if is_present)
