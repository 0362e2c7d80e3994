"""The embedded store of blocks against a plain model, over random histories."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.clock import VirtualClock
from cluster.config import StoreConfig
from cluster.kvstore.budget import block_cost
from cluster.kvstore.embedded_blocks import EmbeddedBlocks
from cluster.kvstore.eviction import MAX_USES, depth

T = TypeVar("T")

BUDGET_BYTES = 2**20
TTL_S = 30.0

keys = st.sampled_from([bytes([i]) * 26 for i in range(8)])
# Sizes are fractions of the budget, so that a few blocks fill it.
payloads = st.tuples(st.integers(0, 255), st.sampled_from([0, 1, 99, 2**17, 2**18, 2**19, 2**20]))


def run(call: Coroutine[Any, Any, T]) -> T:
    """Run a call that never waits: the embedded store answers at once."""
    try:
        call.send(None)
    except StopIteration as answer:
        return answer.value  # type: ignore[no-any-return]
    raise AssertionError("it waited")


@dataclass
class Entry:
    payload: bytes
    uses: int
    position: int
    end_s: float
    pin_end_s: float  # of the past: it is not pinned
    is_pinned: bool
    value: float = 0.0
    changed: int = 0  # number of the last change of value
    pin_number: int = 0  # of the last pin: they end in this order

    @property
    def cost(self) -> int:
        return block_cost(len(self.payload))


class BlocksModel(RuleBasedStateMachine):
    """The rules once more, each as a search through all that there is."""

    @initialize()
    def begin(self) -> None:
        self.clock = VirtualClock()
        config = StoreConfig.model_validate({"max_bytes": BUDGET_BYTES, "kv_ttl_s": TTL_S})
        self.store = EmbeddedBlocks(config, self.clock)
        self.entries: dict[bytes, Entry] = {}
        self.age = 0.0
        self.num_changes = self.num_evicted = self.num_pins = 0

    def live(self) -> dict[bytes, Entry]:
        now_s = self.clock.now()
        self.entries = {k: e for k, e in self.entries.items() if e.end_s > now_s}
        ended = [e for e in self.entries.values() if e.is_pinned and e.pin_end_s <= now_s]
        for entry in sorted(ended, key=lambda entry: entry.pin_number):
            entry.is_pinned = False
            self.revalue(entry)
        return self.entries

    def pin(self, entry: Entry) -> None:
        self.num_pins += 1
        entry.is_pinned, entry.pin_number = True, self.num_pins
        entry.pin_end_s = self.clock.now() + TTL_S

    def revalue(self, entry: Entry) -> None:
        self.num_changes += 1
        entry.changed = self.num_changes
        entry.value = self.age + entry.uses - depth(entry.position)

    def may_pin(self, cost: int) -> bool:
        pinned = sum(entry.cost for entry in self.entries.values() if entry.is_pinned)
        return pinned + cost <= BUDGET_BYTES // 2

    @rule(delta_s=st.sampled_from([1.0, 10.0, 20.0]))
    def pass_time(self, delta_s: float) -> None:
        self.clock.advance(delta_s)

    @rule(
        batch=st.dictionaries(keys, payloads, max_size=4),
        pinned=st.booleans(),
        position=st.integers(0, 2),
    )
    def put(self, batch: dict[bytes, tuple[int, int]], pinned: bool, position: int) -> None:
        blocks = {key: bytes([byte]) * size for key, (byte, size) in batch.items()}
        stored = run(self.store.put_blocks(blocks, pinned=pinned, position=position))
        entries = self.live()
        before = {key: entries.pop(key, None) for key in blocks}
        batch_entries: dict[bytes, Entry] = {}
        expected = []
        for place, (key, payload) in enumerate(blocks.items(), position):
            old = before[key]
            cost = block_cost(len(payload))
            others = [*entries.values(), *batch_entries.values()]
            fixed = [*batch_entries.values(), *(e for e in entries.values() if e.is_pinned)]
            fits = cost + sum(entry.cost for entry in fixed) <= BUDGET_BYTES
            expected.append(fits)
            if not fits:
                continue
            while cost + sum(entry.cost for entry in others) > BUDGET_BYTES:
                victim = min(
                    (k for k, e in entries.items() if not e.is_pinned),
                    key=lambda k: (entries[k].value, entries[k].changed),
                )
                self.age = entries.pop(victim).value
                self.num_evicted += 1
                others = [*entries.values(), *batch_entries.values()]
            pins = pinned or (old is not None and old.is_pinned)
            held = sum(e.cost for e in others if e.is_pinned)
            uses = min((old.uses if old else 0) + 1, MAX_USES)
            end_s = self.clock.now() + TTL_S
            is_pinned = pins and held + cost <= BUDGET_BYTES // 2
            entry = Entry(payload, uses, place, end_s, 0.0, is_pinned)
            if old is not None:
                entry.pin_end_s, entry.pin_number = old.pin_end_s, old.pin_number
            batch_entries[key] = entry
        for key, entry in batch_entries.items():
            self.revalue(entry)
            if entry.is_pinned and pinned:
                self.pin(entry)
            entries[key] = entry
        assert stored == expected

    def use(self, key: bytes) -> Entry | None:
        entry = self.live().get(key)
        if entry is not None:
            entry.uses = min(entry.uses + 1, MAX_USES)
            entry.end_s = self.clock.now() + TTL_S
            self.revalue(entry)
        return entry

    @rule(asked=st.lists(keys, max_size=5))
    def get(self, asked: list[bytes]) -> None:
        found = run(self.store.get_blocks(asked)).values
        for key in dict.fromkeys(asked):
            self.use(key)
        assert found == [getattr(self.entries.get(key), "payload", None) for key in asked]

    @rule(asked=st.lists(keys, max_size=5), pinned=st.booleans())
    def touch(self, asked: list[bytes], pinned: bool) -> None:
        found = run(self.store.touch_blocks(asked, pinned=pinned))
        for key in dict.fromkeys(asked):
            entry = self.use(key)
            if entry is not None and pinned and (entry.is_pinned or self.may_pin(entry.cost)):
                self.pin(entry)
        assert found == [key in self.entries for key in asked]

    @rule(asked=st.lists(keys, max_size=5))
    def unpin(self, asked: list[bytes]) -> None:
        run(self.store.unpin_blocks(asked))
        for key in asked:
            entry = self.live().get(key)
            if entry is not None and entry.is_pinned:
                entry.is_pinned = False
                entry.end_s = self.clock.now() + TTL_S
                self.revalue(entry)

    @rule(asked=st.lists(keys, max_size=5))
    def has(self, asked: list[bytes]) -> None:
        live = self.live()
        assert run(self.store.has_blocks(asked)) == [key in live for key in asked]

    @rule(limit=st.integers(0, 9))
    def hottest(self, limit: int) -> None:
        live = self.live()
        ranked = sorted(
            live, key=lambda k: (live[k].is_pinned, live[k].value, live[k].changed), reverse=True
        )
        assert run(self.store.hottest(b"", limit)) == ranked[:limit]

    @rule()
    def stats(self) -> None:
        live = self.live().values()
        stats = run(self.store.stats())
        assert stats.used_bytes == sum(entry.cost for entry in live)
        assert stats.num_blocks == len(live)
        assert stats.num_pinned == sum(entry.is_pinned for entry in live)
        assert stats.num_evicted == self.num_evicted

    @rule(really=st.integers(0, 5))
    def flush(self, really: int) -> None:
        if really == 0:
            assert run(self.store.flush()) == len(self.live())
            self.entries, self.age, self.num_evicted = {}, 0.0, 0

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "store"):
            self.store.check_invariants()


TestBlocksModel = BlocksModel.TestCase
TestBlocksModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_embedded_block_ttl_ends_at_its_very_moment() -> None:
    clock = VirtualClock()
    store = EmbeddedBlocks(StoreConfig.model_validate({"kv_ttl_s": 8.0}), clock)
    run(store.put_blocks({b"k" * 26: b"payload"}))
    clock.advance(7.75)
    assert run(store.has_blocks([b"k" * 26])) == [True]
    clock.advance(0.25)
    assert run(store.has_blocks([b"k" * 26])) == [False]
    assert run(store.stats()).used_bytes == 0


def test_embedded_empty_blocks_are_not_free() -> None:
    store = EmbeddedBlocks(StoreConfig.model_validate({"max_bytes": BUDGET_BYTES}), VirtualClock())
    blocks = {i.to_bytes(26, "little"): b"" for i in range(10_000)}
    num_fit = BUDGET_BYTES // block_cost(0)
    assert run(store.put_blocks(blocks)) == [i < num_fit for i in range(10_000)]
    store.check_invariants()
