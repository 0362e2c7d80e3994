"""The embedded store against a plain model, over random histories."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from plain_journals import PlainJournals

from cluster.clock import VirtualClock
from cluster.config import StoreConfig
from cluster.errors import OverloadedError
from cluster.kvstore.embedded import MAX_COUNTERS, EmbeddedStore
from cluster.kvstore.store import JournalOutcome, JournalWrite, JournalWrites

T = TypeVar("T")

JOURNAL_TTL_S = 20.0
JOURNAL_BUDGET_BYTES = 2**16

names = st.sampled_from("ab")
journal_keys = st.sampled_from("uvwxyz")
journal_writes = st.builds(
    JournalWrite,
    key=journal_keys,
    scope=st.sampled_from("aaab"),
    owner=names,
    entries=st.lists(st.sampled_from([0, 9_000, 20_000, 64_000]).map(bytes), max_size=2).map(tuple),
    begins=st.booleans(),
    ends=st.sampled_from([False, False, True]),
)


BEGIN = JournalWrite("r", "team", "A", (b"a",), begins=True)
LARGE = JournalWrite("large", "team", "A", (bytes(60_000),), begins=True)


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
        config = StoreConfig(journal_ttl_s=JOURNAL_TTL_S, journal_bytes=JOURNAL_BUDGET_BYTES)
        self.store = EmbeddedStore(config, self.clock)
        self.leases: dict[tuple[str, str], tuple[bytes, float]] = {}
        self.counters: dict[str, tuple[int, float]] = {}
        self.records: dict[tuple[str, str], bytes] = {}
        self.copies: dict[str, tuple[str, dict[str, bytes] | None]] = {}
        self.journals = PlainJournals(JOURNAL_BUDGET_BYTES, JOURNAL_TTL_S)

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

    @rule(writes=st.lists(journal_writes, min_size=1, max_size=4))
    def write_journals(self, writes: list[JournalWrite]) -> None:
        expected = self.journals.write(writes, self.clock.now())
        assert run(self.store.write_journals(writes)) == expected

    @rule(key=journal_keys)
    def read_journal(self, key: str) -> None:
        expected = self.journals.read(key, self.clock.now())
        assert run(self.store.read_journal(key)) == expected

    @rule(key=journal_keys, scope=names, owner=names)
    def claim_journal(self, key: str, scope: str, owner: str) -> None:
        expected = self.journals.claim(key, scope, owner, self.clock.now())
        assert run(self.store.claim_journal(key, scope, owner)) == expected

    @invariant()
    def counters_are_right(self) -> None:
        if hasattr(self, "store"):
            self.store.check_invariants()


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_embedded_journal_that_was_read_is_the_readers_own() -> None:
    store = EmbeddedStore(StoreConfig(), VirtualClock())
    run(store.write_journals([BEGIN]))
    for journal in (
        run(store.read_journal("r")),
        run(store.claim_journal("r", "team", "A")),
    ):
        assert journal is not None
        journal.entries.append(b"mine")
    run(store.write_journals([JournalWrite("r", "team", "A", (b"b",))]))
    assert journal.entries == [b"a", b"mine"]
    again = run(store.read_journal("r"))
    assert again is not None
    assert again.entries == [b"a", b"b"]


def test_embedded_ttl_ends_at_its_very_moment() -> None:
    clock = VirtualClock()
    config = StoreConfig.model_validate({"journal_ttl_s": 8.0})
    store = EmbeddedStore(config, clock)
    run(store.put_lease("replica", "a", b"", 8.0))
    run(store.write_journals([BEGIN]))
    run(store.count("longer", 1, 80.0))
    run(store.count("a", 5, 8.0))
    clock.advance(7.75)
    assert run(store.count("a", 0, 8.0)) == 5
    assert run(store.list_leases("replica")) == {"a": b""}
    assert run(store.read_journal("r")) is not None
    clock.advance(0.25)
    assert run(store.count("a", 0, 8.0)) == 0
    assert run(store.list_leases("replica")) == {}
    assert run(store.read_journal("r")) is None


def _begin_many(store: EmbeddedStore, num_journals: int) -> None:
    names = map(str, range(num_journals))
    run(store.write_journals([JournalWrite(name, "team", "A", (), begins=True) for name in names]))


def test_embedded_journals_that_expired_go_before_one_that_has_ended() -> None:
    clock = VirtualClock()
    store = EmbeddedStore(StoreConfig(journal_ttl_s=8.0, journal_bytes=2**16), clock)
    _begin_many(store, 60)
    clock.advance(4.0)
    run(store.write_journals([BEGIN, JournalWrite("r", "team", "A", (), ends=True)]))
    clock.advance(4.0)
    assert run(store.write_journals([LARGE])) == JournalWrites([JournalOutcome.WRITTEN], 0, 0)
    assert run(store.read_journal("r")) is not None
    store.check_invariants()


def test_embedded_journals_that_expired_are_not_counted_as_dropped() -> None:
    clock = VirtualClock()
    store = EmbeddedStore(StoreConfig(journal_ttl_s=8.0, journal_bytes=2**16), clock)
    _begin_many(store, 100)  # more than one write sweeps
    clock.advance(8.0)
    assert run(store.write_journals([LARGE])) == JournalWrites([JournalOutcome.WRITTEN], 0, 0)
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
