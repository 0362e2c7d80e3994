"""The embedded store against a plain model, over random histories."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.clock import VirtualClock
from cluster.config import StoreConfig
from cluster.errors import OverloadedError
from cluster.kvstore.embedded import MAX_COUNTERS, EmbeddedStore

T = TypeVar("T")

JOURNAL_TTL_S = 20.0

names = st.sampled_from("ab")


def run(call: Coroutine[Any, Any, T]) -> T:
    """Run a call that never waits: the embedded store answers at once."""
    try:
        call.send(None)
    except StopIteration as answer:
        return answer.value  # type: ignore[no-any-return]
    raise AssertionError("it waited")


class StoreModel(RuleBasedStateMachine):
    """Each structure once more, as plainly as can be: a list of what was written, in order."""

    @initialize()
    def begin(self) -> None:
        self.clock = VirtualClock()
        config = StoreConfig.model_validate({"journal_ttl_s": JOURNAL_TTL_S})
        self.store = EmbeddedStore(config, self.clock, max_journal_bytes=1000)
        self.leases: dict[tuple[str, str], tuple[bytes, float]] = {}
        self.counters: dict[str, tuple[int, float]] = {}
        self.records: dict[tuple[str, str], bytes] = {}
        self.copies: dict[str, tuple[str, dict[str, bytes] | None]] = {}
        self.journals: list[tuple[str, list[bytes], float]] = []  # oldest append first

    @rule(delta_s=st.sampled_from([0.5, 5.0, 10.0, 20.0]))
    def pass_time(self, delta_s: float) -> None:
        self.clock.advance(delta_s)

    @rule(kind=names, key=names, value=st.binary(max_size=3), ttl_s=st.sampled_from([5.0, 10.0]))
    def put_lease(self, kind: str, key: str, value: bytes, ttl_s: float) -> None:
        run(self.store.put_lease(kind, key, value, ttl_s))
        self.leases[kind, key] = (value, self.clock.now() + ttl_s)

    @rule(kind=names, key=names)
    def drop_lease(self, kind: str, key: str) -> None:
        run(self.store.drop_lease(kind, key))
        self.leases.pop((kind, key), None)

    @rule(kind=names)
    def list_leases(self, kind: str) -> None:
        expected = {
            key: value
            for (of, key), (value, end_s) in sorted(self.leases.items())
            if of == kind and end_s > self.clock.now()
        }
        assert list(run(self.store.list_leases(kind)).items()) == list(expected.items())

    @rule(
        key=st.sampled_from("abcd"),
        amount=st.integers(-3, 9),
        ttl_s=st.sampled_from([5.0, 10.0, 30.0]),
        at_most=st.sampled_from([None, 7]),
    )
    def count(self, key: str, amount: int, ttl_s: float, at_most: int | None) -> None:
        now_s = self.clock.now()
        known, end_s = self.counters.get(key, (0, 0.0))
        if end_s <= now_s:
            known, end_s = 0, now_s + ttl_s
        assert run(self.store.count(key, amount, ttl_s, at_most=at_most)) == known + amount
        if amount and (at_most is None or known + amount <= at_most):
            self.counters[key] = (known + amount, end_s)

    @rule(kind=names, key=names, value=st.binary(max_size=3))
    def put_record(self, kind: str, key: str, value: bytes) -> None:
        run(self.store.put_record(kind, key, value))
        self.records[kind, key] = value

    @rule(kind=names, key=names)
    def drop_record(self, kind: str, key: str) -> None:
        run(self.store.drop_record(kind, key))
        self.records.pop((kind, key), None)

    @rule(kind=names)
    def list_records(self, kind: str) -> None:
        """What is the same by its version is the same, and what differs has another version."""
        expected = {key: value for (of, key), value in self.records.items() if of == kind}
        version, copy = self.copies.get(kind, ("", None))
        records = run(self.store.list_records(kind, version))
        if records.values is None:
            assert (records.version, expected) == (version, copy)
        else:
            assert records.values == expected
        self.copies[kind] = (records.version, expected)

    def _journal(self, key: str) -> list[bytes]:
        for name, entries, end_s in self.journals:
            if name == key and end_s > self.clock.now():
                return entries
        return []

    @rule(key=names, entries=st.lists(st.binary(max_size=300), max_size=3))
    def append_journal(self, key: str, entries: list[bytes]) -> None:
        after = self._journal(key) + entries
        if _journal_bytes(after) > 1000:
            with pytest.raises(OverloadedError):
                run(self.store.append_journal(key, entries))
            return
        assert run(self.store.append_journal(key, entries)) == len(after)
        others = [journal for journal in self.journals if journal[0] != key]
        end_s = self.clock.now() + JOURNAL_TTL_S
        self.journals = [*others, (key, after, end_s)] if after else others
        while sum(_journal_bytes(kept) for _, kept, _ in self.journals) > 1000:
            self.journals.pop(0)

    @rule(key=names, start=st.integers(0, 5))
    def read_journal(self, key: str, start: int) -> None:
        assert run(self.store.read_journal(key, start)) == self._journal(key)[start:]

    @rule(key=names)
    def drop_journal(self, key: str) -> None:
        run(self.store.drop_journal(key))
        self.journals = [journal for journal in self.journals if journal[0] != key]

    @invariant()
    def counters_are_right(self) -> None:
        if hasattr(self, "store"):
            self.store.check_invariants()


def _journal_bytes(entries: list[bytes]) -> int:
    return sum(len(entry) + 64 for entry in entries)


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_embedded_read_journal_is_not_changed_by_later_appends() -> None:
    store = EmbeddedStore(StoreConfig.model_validate({}), VirtualClock())

    async def check() -> None:
        await store.append_journal("r", [b"a"])
        read = await store.read_journal("r")
        read.append(b"mine")
        await store.append_journal("r", [b"b"])
        assert await store.read_journal("r") == [b"a", b"b"]
        assert read == [b"a", b"mine"]

    asyncio.run(check())


def test_embedded_ttl_ends_at_its_very_moment() -> None:
    clock = VirtualClock()
    config = StoreConfig.model_validate({"journal_ttl_s": 8.0})
    store = EmbeddedStore(config, clock)
    run(store.put_lease("replica", "a", b"", 8.0))
    run(store.append_journal("r", [b"entry"]))
    run(store.count("longer", 1, 80.0))
    run(store.count("a", 5, 8.0))
    clock.advance(7.75)
    assert run(store.count("a", 0, 8.0)) == 5
    assert run(store.list_leases("replica")) == {"a": b""}
    assert run(store.read_journal("r")) == [b"entry"]
    clock.advance(0.25)
    assert run(store.count("a", 0, 8.0)) == 0
    assert run(store.list_leases("replica")) == {}
    assert run(store.read_journal("r")) == []


def test_embedded_journal_that_was_silent_longest_makes_room() -> None:
    store = EmbeddedStore(StoreConfig.model_validate({}), VirtualClock(), max_journal_bytes=1000)
    entry = [bytes(300 - 64)]
    for key in ("a", "b", "c", "a", "d"):  # the last two are 1,200 bytes and more with b and c
        run(store.append_journal(key, entry if key != "a" else [bytes(100)]))
    assert [len(run(store.read_journal(key))) for key in "abcd"] == [2, 0, 1, 1]
    store.check_invariants()


def test_embedded_counters_that_ended_make_room_behind_longer_ones() -> None:
    clock = VirtualClock()
    store = EmbeddedStore(StoreConfig(), clock)
    for number in range(MAX_COUNTERS):
        run(store.count(str(number), 1, 10.0 if number % 2 else 90.0))
    clock.advance(10.0)
    assert run(store.count("one more", 1, 60.0)) == 1
    assert run(store.count("0", 1, 90.0)) == 2
    assert run(store.count("1", 1, 90.0)) == 1
    assert len(store._counters) == MAX_COUNTERS // 2 + 2
    store.check_invariants()


def test_embedded_counters_are_bounded_and_make_room_when_they_end() -> None:
    clock = VirtualClock()
    store = EmbeddedStore(StoreConfig(), clock)
    for number in range(MAX_COUNTERS):
        run(store.count(str(number), 1, 60.0 if number else 90.0))
    with pytest.raises(OverloadedError, match="131072 counters, limit=131072"):
        run(store.count("one more", 1, 60.0))
    assert run(store.count("one more", 0, 60.0)) == 0
    assert run(store.count("7", 1, 60.0)) == 2
    clock.advance(90.0)
    assert run(store.count("one more", 1, 60.0)) == 1
    assert len(store._counters) == 1
