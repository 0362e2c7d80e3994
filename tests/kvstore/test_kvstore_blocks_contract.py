"""What every store of blocks does: embedded, behind a Ray actor, Redis alone, cluster, Sentinel."""

from __future__ import annotations

import random

from kvstore_kinds import Kind, fresh_keys, keys_of_one_shard, plain

from cluster.kvstore.budget import block_cost

MIB = 2**20
TTL_S = 0.8  # two sleeps of 0.6 of it pass it, one leaves a busy machine 0.3 s


async def test_blocks_come_back_bit_exact(kind: Kind) -> None:
    store = await kind.open_blocks()
    chance = random.Random(7)
    sizes = (0, 1, 63, 4096, 65_536, 200_000, 300_000, 2**20, 1_500_000)
    keys = fresh_keys(len(sizes) + 2)
    payloads = [b"\r\n\x00*1\r\n", *(chance.randbytes(size) for size in sizes)]
    blocks = dict(zip(keys[:-1], payloads, strict=True))
    assert await store.put_blocks(blocks) == [True] * len(blocks)
    assert plain(await store.get_blocks(keys)) == [*payloads, None]
    assert plain(await store.get_blocks(keys)) == [*payloads, None]
    assert await store.has_blocks(keys) == [True] * len(blocks) + [False]
    twice = [keys[0], keys[-1], keys[0]]
    fetched = await store.get_blocks(twice)
    assert plain(fetched) == [payloads[0], None, payloads[0]]
    assert fetched.num_corrupt == 0


async def test_blocks_may_be_views_of_wider_items(kind: Kind) -> None:
    store = await kind.open_blocks()
    (key,) = fresh_keys(1)
    payload = bytearray(range(128))
    assert await store.put_blocks({key: memoryview(payload).cast("I")}) == [True]
    payload[0] = 99  # what was stored is a copy
    assert plain(await store.get_blocks([key])) == [bytes(range(128))]


async def test_blocks_of_empty_calls_are_fine(kind: Kind) -> None:
    store = await kind.open_blocks()
    assert await store.put_blocks({}) == []
    assert (await store.get_blocks([])).values == []
    assert await store.has_blocks([]) == []
    assert await store.touch_blocks([]) == []
    await store.unpin_blocks([])
    assert await store.hottest(b"", 5) == []
    assert await store.flush() == 0
    stats = await store.stats()
    assert (stats.used_bytes, stats.num_blocks, stats.num_pinned, stats.num_evicted) == (0, 0, 0, 0)


async def test_blocks_written_again_are_replaced_and_counted_once(kind: Kind) -> None:
    store = await kind.open_blocks()
    same, other = fresh_keys(2)
    await store.put_blocks({other: bytes(1000)})
    for byte in (b"a", b"b", b"c"):
        assert await store.put_blocks({same: byte * 5000}) == [True]
    assert plain(await store.get_blocks([other, same])) == [bytes(1000), b"c" * 5000]
    stats = await store.stats()
    assert stats.used_bytes == block_cost(1000) + block_cost(5000)
    assert stats.num_blocks == 2


async def test_blocks_end_a_ttl_after_their_last_use(kind: Kind) -> None:
    store = await kind.open_blocks(kv_ttl_s=TTL_S)
    silent, read, touched, looked_at, pinned, unpinned = keys = fresh_keys(6)
    await store.put_blocks(dict.fromkeys(keys, b"payload"))
    await store.touch_blocks([pinned, unpinned], pinned=True)
    await kind.elapse(0.6 * TTL_S)
    await store.get_blocks([read])
    await store.touch_blocks([touched])
    await store.has_blocks([looked_at, silent, pinned])
    await store.unpin_blocks([unpinned])  # counts as a use
    await kind.elapse(0.6 * TTL_S)
    assert await store.has_blocks(keys) == [False, True, True, False, False, True]
    await kind.elapse(0.6 * TTL_S)
    assert not any(await store.has_blocks(keys))


async def test_blocks_are_pinned_for_a_ttl_after_the_last_pin(kind: Kind) -> None:
    store = await kind.open_blocks(kv_ttl_s=TTL_S)
    put, renewed, used, written, _silent = keys = keys_of_one_shard(5)
    await store.put_blocks(dict.fromkeys(keys, b"payload"), pinned=True)
    await kind.elapse(0.6 * TTL_S)
    assert (await store.stats()).num_pinned == 5
    await store.touch_blocks([renewed], pinned=True)
    await store.put_blocks({put: b"again"}, pinned=True)
    await store.put_blocks({written: b"again"})
    assert (await store.stats()).num_pinned == 5
    await store.touch_blocks([used])
    await kind.elapse(0.6 * TTL_S)
    assert await store.has_blocks(keys) == [True, True, True, True, False]
    await store.touch_blocks([used])
    stats = await store.stats()
    assert (stats.num_blocks, stats.num_pinned) == (4, 2)  # what is used is a block like others
    assert stats.used_bytes == 2 * block_cost(7) + 2 * block_cost(5)


async def test_blocks_whose_pins_ended_make_room_for_pins(kind: Kind) -> None:
    store = await kind.open_blocks(max_bytes=MIB * kind.num_shards, kv_ttl_s=TTL_S)
    old, new = keys_of_one_shard(4), keys_of_one_shard(4, seed=2)
    await store.put_blocks(dict.fromkeys(old, bytes(105_000)), pinned=True)
    await kind.elapse(1.2 * TTL_S)
    await store.put_blocks(dict.fromkeys(new, bytes(105_000)), pinned=True)
    assert (await store.stats()).num_pinned == 4
    assert await store.has_blocks(old + new) == [False] * 4 + [True] * 4


async def test_blocks_least_used_make_room_first(kind: Kind) -> None:
    store = await kind.open_blocks(max_bytes=MIB * kind.num_shards)
    a, b, c, d, e = keys_of_one_shard(5)
    size = 250_000
    for key in (a, b, c):
        await store.put_blocks({key: bytes(size)})
    await store.get_blocks([a])
    await store.touch_blocks([a, c])
    await store.has_blocks([b] * 5)  # does not count as a use
    assert await store.put_blocks({d: bytes(size)}) == [True]
    assert await store.has_blocks([a, b, c, d]) == [True, False, True, True]
    await store.touch_blocks([d, d])  # one call, one use
    await store.touch_blocks([d])
    assert await store.put_blocks({e: bytes(size)}) == [True]
    assert await store.has_blocks([a, c, d, e]) == [True, False, True, True]
    assert (await store.stats()).num_evicted == 2


async def test_blocks_of_a_chain_make_room_from_its_tail(kind: Kind) -> None:
    store = await kind.open_blocks(max_bytes=MIB * kind.num_shards)
    chain, others = keys_of_one_shard(9), keys_of_one_shard(3, seed=6)
    for start in range(0, 9, 3):
        piece = dict.fromkeys(chain[start : start + 3], bytes(105_000))
        assert await store.put_blocks(piece, position=start) == [True] * 3
    for num_left, other in zip((8, 7, 6), others, strict=True):
        await store.put_blocks({other: bytes(105_000)}, position=0)
        await store.touch_blocks([other])
        assert await store.has_blocks(chain) == [True] * num_left + [False] * (9 - num_left)


async def test_blocks_of_a_batch_beyond_the_budget_leave_its_first_ones(kind: Kind) -> None:
    store = await kind.open_blocks(max_bytes=MIB * kind.num_shards)
    old = keys_of_one_shard(3, seed=8)
    await store.put_blocks(dict.fromkeys(old, bytes(20_000)))
    keys = keys_of_one_shard(14)
    batch = dict.fromkeys(keys, bytes(105_000)) | {keys[2]: bytes(MIB)}
    stored = await store.put_blocks(batch)
    num_fit = MIB // block_cost(105_000)
    assert stored == [i < num_fit + 1 and i != 2 for i in range(14)]
    assert await store.has_blocks(keys) == stored
    assert (await store.stats()).num_evicted == 3


async def test_blocks_written_again_in_a_full_store_are_not_lost(kind: Kind) -> None:
    store = await kind.open_blocks(max_bytes=MIB * kind.num_shards)
    keys = keys_of_one_shard(9)
    for version in (b"a", b"b", b"c"):
        assert await store.put_blocks(dict.fromkeys(keys, version * 105_000)) == [True] * 9
        assert plain(await store.get_blocks(keys)) == [version * 105_000] * 9
    assert (await store.stats()).num_evicted == 0


async def test_blocks_pinned_are_spared_up_to_half_of_the_budget(kind: Kind) -> None:
    store = await kind.open_blocks(max_bytes=MIB * kind.num_shards)
    pinned, touched, others = (
        keys_of_one_shard(4),
        keys_of_one_shard(4, seed=2),
        keys_of_one_shard(40, seed=3),
    )
    await store.put_blocks(dict.fromkeys(touched, bytes(105_000)))
    assert await store.put_blocks(dict.fromkeys(pinned, bytes(105_000)), pinned=True) == [True] * 4
    assert (await store.stats()).num_pinned == 4
    assert await store.touch_blocks(touched, pinned=True) == [True] * 4
    assert (await store.stats()).num_pinned == 4  # a fifth one would pass the half
    for key in others:
        assert await store.put_blocks({key: bytes(105_000)}) == [True]
    assert await store.has_blocks(pinned) == [True] * 4
    assert not any(await store.has_blocks(touched))
    # Written again it stays pinned, and is counted once.
    assert await store.put_blocks({pinned[0]: bytes(105_000)}) == [True]
    assert (await store.stats()).num_pinned == 4
    await store.unpin_blocks([*pinned, touched[0]])
    assert (await store.stats()).num_pinned == 0
    for key in keys_of_one_shard(40, seed=4):
        await store.put_blocks({key: bytes(105_000)})
        await store.touch_blocks([key])
    assert not any(await store.has_blocks(pinned))


async def test_blocks_hottest_are_the_pinned_then_the_most_used_of_a_prefix(kind: Kind) -> None:
    store = await kind.open_blocks()
    ours, theirs = fresh_keys(6), fresh_keys(3, prefix=b"another.01")
    await store.put_blocks(dict.fromkeys(ours + theirs, b"payload"))
    for _ in range(3):
        await store.touch_blocks([ours[4], *theirs])
    await store.touch_blocks([ours[1]])
    await store.touch_blocks([ours[5]], pinned=True)
    expected = [ours[5], ours[4], ours[1], ours[0], ours[2], ours[3]]  # heads before tails
    assert await store.hottest(b"model...01", 10) == expected
    assert await store.hottest(b"model...01", 3) == expected[:3]
    assert set(await store.hottest(b"another.01", 10)) == set(theirs)
    assert await store.hottest(b"absent", 10) == []


async def test_blocks_flush_forgets_everything(kind: Kind) -> None:
    store = await kind.open_blocks()
    keys = fresh_keys(2500)
    for start in range(0, 2500, 250):
        pinned = start == 0
        await store.put_blocks(dict.fromkeys(keys[start : start + 250], b"payload"), pinned=pinned)
    assert (await store.stats()).num_blocks == 2500
    assert await store.flush() == 2500
    assert not any(await store.has_blocks(keys))
    stats = await store.stats()
    assert (stats.used_bytes, stats.num_blocks, stats.num_pinned, stats.num_evicted) == (0, 0, 0, 0)
    assert await store.put_blocks({keys[0]: b"again"}) == [True]


async def test_blocks_budget_holds_under_ten_times_its_volume(kind: Kind) -> None:
    max_bytes = 4 * MIB * kind.num_shards
    store = await kind.open_blocks(max_bytes=max_bytes)
    chance = random.Random(11)
    hot = {key: chance.randbytes(20_000) for key in fresh_keys(20 * kind.num_shards, seed=1)}
    await store.put_blocks(hot)
    await store.touch_blocks(list(hot))
    num_bytes = num_hits = num_reads = 0
    while num_bytes < 10 * max_bytes:
        batch = {
            b"model...01" + chance.randbytes(16): bytes(chance.randrange(1, 120_000))
            for _ in range(16 * kind.num_shards)
        }
        assert all(await store.put_blocks(batch))
        num_bytes += sum(map(len, batch.values()))
        assert (await store.stats()).used_bytes <= max_bytes
        found = await store.get_blocks(list(hot))
        num_reads += len(hot)
        num_hits += sum(value is not None for value in found.values)
        assert all(v is None or v == w for v, w in zip(found.values, hot.values(), strict=True))
    assert num_hits >= 0.95 * num_reads
    # Most of the budget is in use, too: of a shard the most that is missing is one block.
    assert (await store.stats()).used_bytes > max_bytes - kind.num_shards * block_cost(120_000)


async def test_block_namespaces_do_not_see_each_other(kind: Kind) -> None:
    left, right = await kind.open_blocks(), await kind.open_blocks()
    (key,) = fresh_keys(1)
    await left.put_blocks({key: b"left"})
    assert plain(await right.get_blocks([key])) == [None]
    await right.put_blocks({key: b"right"})
    assert plain(await left.get_blocks([key])) == [b"left"]
    assert await right.flush() == 1
    assert await left.has_blocks([key]) == [True]
