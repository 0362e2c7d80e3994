"""What every store does: embedded, behind a Ray actor, Redis alone, in a cluster, by Sentinel."""

from __future__ import annotations

import asyncio

import pytest
from kvstore_kinds import Kind

from cluster.errors import InvalidArgumentError, OverloadedError
from cluster.kvstore.store import MAX_RECORD_BYTES, MAX_RECORDS

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


async def test_counter_adds_up_and_is_read_by_adding_nothing(kind: Kind) -> None:
    store = await kind.open()
    assert await store.count("a", 0, 30.0) == 0
    assert await store.count("a", 5, 30.0) == 5
    assert await store.count("a", 2**50, 30.0) == 2**50 + 5
    assert await store.count("a", -(2**50), 30.0) == 5
    assert await store.count("a:b", -3, 30.0) == -3
    assert await store.count("a", 0, 30.0) == 5


async def test_counter_takes_nothing_beyond_what_it_may_be(kind: Kind) -> None:
    store = await kind.open()
    assert await store.count("a", 8, 30.0, at_most=10) == 8
    assert await store.count("a", 3, 30.0, at_most=10) == 11
    assert await store.count("a", 2, 30.0, at_most=10) == 10
    assert await store.count("a", 0, 30.0, at_most=0) == 10
    assert await store.count("a", -1, 30.0, at_most=10) == 9
    assert await store.count("b", 1, 30.0, at_most=-4) == 1
    assert await store.count("b", 0, 30.0) == 0


async def test_counter_of_many_writers_is_exact(kind: Kind) -> None:
    store = await kind.open()
    sums = await asyncio.gather(*(store.count("a", 1, 30.0, at_most=40) for _ in range(60)))
    assert sorted(sums) == [*range(1, 41), *[41] * 20]
    assert await store.count("a", 0, 30.0) == 40


async def test_counter_ends_a_ttl_after_its_first_addition(kind: Kind) -> None:
    store = await kind.open()
    await store.count("refused", 2, 30.0, at_most=1)  # no addition
    await store.count("read", 0, 30.0)  # nor this
    await store.count("lasting", 1, 30.0)
    for key in ("a", "refused", "read"):
        await store.count(key, 1, TTL_S)
    await kind.elapse(0.6 * TTL_S)
    assert await store.count("a", 1, TTL_S) == 2
    await kind.elapse(0.6 * TTL_S)
    for key in ("a", "refused", "read"):
        assert await store.count(key, 1, TTL_S) == 1
    assert await store.count("lasting", 1, TTL_S) == 2


async def test_record_is_listed_by_key_until_it_is_dropped(kind: Kind) -> None:
    store = await kind.open()
    assert (await store.list_records("prefix")).values == {}
    for key in ("b", "a:1", "c"):
        await store.put_record("prefix", key, key.encode())
    await store.put_record("prefix", "c", b"\x00\xff" * 50_000)
    await store.put_record("other", "a", b"")
    await store.drop_record("prefix", "b")
    await store.drop_record("prefix", "never there")
    records = await store.list_records("prefix")
    assert records.values is not None
    assert list(records.values.items()) == [("a:1", b"a:1"), ("c", b"\x00\xff" * 50_000)]
    assert (await store.list_records("other")).values == {"a": b""}


async def test_record_version_says_whether_anything_changed(kind: Kind) -> None:
    store = await kind.open()
    versions = [(await store.list_records("prefix")).version]
    changes = [
        lambda: store.put_record("prefix", "a", b"1"),
        lambda: store.put_record("prefix", "a", b"2"),
        lambda: store.put_record("prefix", "b", b""),
        lambda: store.drop_record("prefix", "a"),
        lambda: store.drop_record("prefix", "b"),
        lambda: store.put_record("prefix", "a", b"1"),
    ]
    for change in changes:
        await change()
        records = await store.list_records("prefix", versions[-1])
        assert records.values is not None
        versions.append(records.version)
        await store.put_record("other", "a", b"")
        await store.drop_record("prefix", "never there")
        assert (await store.list_records("prefix", versions[-1])).values is None
    assert len(set(versions)) == len(versions)
    assert (await store.list_records("prefix", versions[-2])).values == {"a": b"1"}
    assert (await store.list_records("prefix")).values == {"a": b"1"}


async def test_record_put_if_absent_replaces_nothing(kind: Kind) -> None:
    store = await kind.open()
    assert await store.put_record("prefix", "a", b"mine", if_absent=True)
    version = (await store.list_records("prefix")).version
    assert not await store.put_record("prefix", "a", b"theirs", if_absent=True)
    assert await store.put_record("prefix", "a", b"mine", if_absent=True)
    assert (await store.list_records("prefix", version)).values is None  # neither is a change
    assert await store.put_record("prefix", "a", b"theirs")
    assert (await store.list_records("prefix")).values == {"a": b"theirs"}
    answers = await asyncio.gather(
        *(store.put_record("prefix", "b", b"%d" % i, if_absent=True) for i in range(20))
    )
    assert sum(answers) == 1
    values = (await store.list_records("prefix")).values
    assert values == {"a": b"theirs", "b": b"%d" % answers.index(True)}


async def test_record_beyond_the_limits_is_refused(kind: Kind) -> None:
    store = await kind.open()
    await store.put_record("prefix", "a", bytes(MAX_RECORD_BYTES))
    with pytest.raises(InvalidArgumentError, match="prefix/b has 1048577 bytes, limit=1048576"):
        await store.put_record("prefix", "b", bytes(MAX_RECORD_BYTES + 1))
    if kind.name == "actor":  # the embedded store behind a call of milliseconds: not 4,096 times
        return
    names = [f"{i:04}" for i in range(MAX_RECORDS)]
    for start in range(0, MAX_RECORDS, 32):
        await asyncio.gather(
            *(store.put_record("full", name, b"") for name in names[start : start + 32])
        )
    for if_absent in (False, True):
        with pytest.raises(OverloadedError, match="4096 records of kind full"):
            await store.put_record("full", "one more", b"", if_absent=if_absent)
    assert await store.put_record("full", names[0], b"", if_absent=True)
    await store.put_record("full", names[0], b"again")
    await store.drop_record("full", names[1])
    await store.put_record("full", "one more", b"")
    values = (await store.list_records("full")).values
    assert values is not None
    assert len(values) == MAX_RECORDS


async def test_namespaces_do_not_see_each_other(kind: Kind) -> None:
    left, right = await kind.open(), await kind.open()
    await left.put_lease("replica", "a", b"", 30.0)
    await left.put_record("prefix", "a", b"left")
    await left.count("a", 1, 30.0)
    assert await right.count("a", 0, 30.0) == 0
    assert await right.list_leases("replica") == {}
    assert (await right.list_records("prefix")).values == {}
