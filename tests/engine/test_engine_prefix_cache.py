from __future__ import annotations

from cluster.engine.block_pool import BlockPool
from cluster.engine.prefix_cache import PrefixCache


def make_cache(num_blocks: int = 4, *, is_enabled: bool = True) -> PrefixCache:
    return PrefixCache(BlockPool(num_blocks), is_enabled=is_enabled)


def fill(cache: PrefixCache, *hashes: bytes) -> list[int]:
    """Return a table whose blocks are registered under these hashes."""
    return [cache.register(h, b) for h, b in zip(hashes, cache.allocate(len(hashes)), strict=True)]


def test_cache_matches_the_longest_prefix_only() -> None:
    cache = make_cache()
    table = fill(cache, b"a", b"b", b"c")
    assert cache.match([b"a", b"b", b"x", b"c"]) == table[:2]
    assert cache.match([b"b"]) == table[1:2]
    assert cache.match([b"x", b"a"]) == []


def test_cache_match_hashes_no_further_than_the_first_miss() -> None:
    cache = make_cache()
    fill(cache, b"a")
    hashes = iter([b"a", b"x", b"y"])
    cache.match(hashes)
    assert list(hashes) == [b"y"]


def test_cache_evicts_the_end_of_the_least_recently_used_chain() -> None:
    cache = make_cache(4)
    old, new = fill(cache, b"a", b"b"), fill(cache, b"c", b"d")
    cache.release(old)
    cache.release(new)
    assert cache.num_free_blocks == 4
    cache.acquire(cache.match([b"a"]))  # in use again, unlike b
    assert cache.allocate(1) == [old[1]]
    assert cache.allocate(1) == [new[1]]
    assert cache.hashes() == [b"a", b"c"]
    cache.check_invariants([old[:1], [old[1]], [new[1]]])


def test_cache_register_keeps_the_first_of_two_copies() -> None:
    cache = make_cache(3)
    (first,) = fill(cache, b"a")
    (mine,) = cache.allocate(1)
    assert cache.register(b"a", mine) == first
    assert cache.num_free_blocks == 2
    cache.check_invariants([[first], [first]])
    cache.release([first])
    assert cache.num_free_blocks == 2
    cache.release([first])
    assert cache.num_free_blocks == 3
    assert cache.take_events() == ([b"a"], [])


def test_cache_room_counts_matched_blocks_that_are_free_themselves() -> None:
    cache = make_cache(3)
    table = fill(cache, b"a", b"b")
    assert cache.has_room(table, 1)
    cache.release(table)
    assert cache.num_free_blocks == 3
    assert cache.has_room(table, 1)
    assert not cache.has_room(table, 2)


def test_cache_events_are_in_order_and_coalesced() -> None:
    cache = make_cache(2)
    table = fill(cache, b"a", b"b")
    cache.release(table)
    assert cache.take_events() == ([b"a", b"b"], [])
    assert cache.take_events() == ([], [])
    table = fill(cache, b"c", b"d")  # evicts b, then a
    cache.release(table)
    fill(cache, b"a")  # evicts d before anybody heard of it; a comes back
    assert cache.take_events() == ([b"c"], [b"b"])
    assert cache.hashes() == [b"c", b"a"]


def test_cache_disabled_finds_and_keeps_nothing() -> None:
    cache = make_cache(2, is_enabled=False)
    table = fill(cache, b"a", b"b")
    assert cache.match([b"a"]) == []
    cache.release(table)
    assert (cache.hashes(), cache.take_events()) == ([], ([], []))
    cache.check_invariants([])
