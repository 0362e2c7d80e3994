"""The order of eviction: against a plain model, and the properties that it is chosen for."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.kvstore.eviction import MAX_USES, EvictionOrder, depth


def test_eviction_least_used_goes_first_and_of_equals_the_least_recent() -> None:
    order = EvictionOrder[str]()
    for key in "abcd":
        order.add(key)
    order.use("a")
    order.use("c")
    assert [order.pop() for _ in range(4)] == ["b", "d", "a", "c"]


def test_eviction_tail_of_a_chain_goes_before_its_head() -> None:
    order = EvictionOrder[int]()
    for position in range(2000):
        order.add(position, position=position)
    assert [order.pop() for _ in range(2000)] == list(reversed(range(2000)))


def test_eviction_one_use_is_worth_more_than_any_place() -> None:
    order = EvictionOrder[str]()
    order.add("head")
    order.add("far", uses=2, position=10**6)
    assert depth(0) == 0
    assert depth(10**6) < depth(10**7) < 1
    assert order.pop() == "head"


def test_eviction_hot_set_survives_a_scan_of_ten_times_the_room() -> None:
    order = EvictionOrder[str]()
    hot = [f"hot{i}" for i in range(50)]
    for key in hot:
        order.add(key)
        order.use(key)
    num_hits = num_reads = 0
    for i in range(1000):  # room for 100 keys
        if len(order) == 100:
            order.pop()
        order.add(f"once{i}")
        if i % 10 == 0:
            for key in hot:
                num_reads += 1
                num_hits += key in order
                if key in order:
                    order.use(key)
    assert num_hits == num_reads


def test_eviction_what_was_hot_once_is_overtaken() -> None:
    order = EvictionOrder[str]()
    order.add("old", uses=10**9)
    num_popped = 0
    for i in range(10_000):
        order.add(f"new{i}")
        if len(order) > 10 and order.pop() == "old":
            break
        num_popped += 1
    assert 10 * (MAX_USES - 2) < num_popped < 10 * (MAX_USES + 2)


def test_eviction_spares_what_is_pinned() -> None:
    order = EvictionOrder[str]()
    for key in "abc":
        order.add(key)
    order.pin("a")
    order.pin("a")
    assert order.num_pinned == 1
    assert order.pop() == "b"
    order.pin("c")
    with pytest.raises(KeyError, match="pinned"):
        order.pop()
    order.unpin("a")
    order.unpin("a")
    assert order.pop() == "a"
    order.remove("c")
    assert order.num_pinned == 0
    with pytest.raises(KeyError, match="no keys"):
        order.pop()


def test_eviction_hottest_begins_with_the_pinned() -> None:
    order = EvictionOrder[str]()
    for uses, key in enumerate("abcd", 1):
        order.add(key, uses)
    order.pin("b")
    assert order.hottest(3) == ["b", "d", "c"]
    assert order.hottest(9) == ["b", "d", "c", "a"]


@pytest.mark.parametrize("method", ["use", "remove", "pin", "unpin", "value", "uses", "is_pinned"])
def test_eviction_unknown_key_is_an_error(method: str) -> None:
    with pytest.raises(KeyError):
        getattr(EvictionOrder[str](), method)("absent")


def test_eviction_garbage_is_bounded_under_many_uses() -> None:
    order = EvictionOrder[int]()
    for key in range(10):
        order.add(key)
    for i in range(100_000):
        order.use(i % 10)
        assert len(order._heap) <= 2 * 10 + 64
    order.check_invariants()


keys = st.sampled_from("abcdef")


class OrderModel(RuleBasedStateMachine):
    """The same as a list that is sorted anew for each pop."""

    def __init__(self) -> None:
        super().__init__()
        self.order = EvictionOrder[str]()
        self.model: dict[str, list[float]] = {}  # key -> value, number, uses, position, pinned
        self.age = 0.0
        self.number = 0

    def revalue(self, key: str) -> None:
        entry = self.model[key]
        self.number += 1
        entry[0], entry[1] = self.age + entry[2] - depth(int(entry[3])), self.number

    @rule(key=keys, uses=st.integers(0, 40), position=st.integers(0, 3))
    def add(self, key: str, uses: int, position: int) -> None:
        if key not in self.model:
            self.order.add(key, uses, position)
            self.model[key] = [0, 0, min(uses, MAX_USES), position, False]
            self.revalue(key)

    @rule(key=keys)
    def use(self, key: str) -> None:
        if key in self.model:
            self.order.use(key)
            self.model[key][2] = min(self.model[key][2] + 1, MAX_USES)
            self.revalue(key)

    @rule(key=keys)
    def remove(self, key: str) -> None:
        if self.model.pop(key, None) is not None:
            self.order.remove(key)

    @rule(key=keys)
    def pin(self, key: str) -> None:
        if key in self.model:
            self.order.pin(key)
            self.model[key][4] = True

    @rule(key=keys)
    def unpin(self, key: str) -> None:
        if key in self.model:
            self.order.unpin(key)
            if self.model[key][4]:
                self.model[key][4] = False
                self.revalue(key)

    @rule()
    def pop(self) -> None:
        free = [key for key, entry in self.model.items() if not entry[4]]
        if not free:
            with pytest.raises(KeyError):
                self.order.pop()
            return
        expected = min(free, key=lambda key: self.model[key][:2])
        self.age = self.model.pop(expected)[0]
        assert self.order.pop() == expected

    @rule(limit=st.integers(0, 7))
    def hottest(self, limit: int) -> None:
        ranked = sorted(self.model, key=lambda k: (self.model[k][4], *self.model[k][:2]))
        assert self.order.hottest(limit) == ranked[::-1][:limit]

    @invariant()
    def agrees(self) -> None:
        self.order.check_invariants()
        assert len(self.order) == len(self.model)
        assert self.order.num_pinned == sum(entry[4] for entry in self.model.values())
        for key, entry in self.model.items():
            assert key in self.order
            assert self.order.value(key) == entry[0]
            assert self.order.uses(key) == entry[2]
            assert self.order.is_pinned(key) == entry[4]


TestOrderModel = OrderModel.TestCase
TestOrderModel.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_eviction_of_random_history_is_deterministic() -> None:
    def history() -> list[int]:
        chance, order, popped = random.Random(3), EvictionOrder[int](), []
        for _ in range(3000):
            key = chance.randrange(200)
            if key in order:
                order.use(key)
            else:
                order.add(key, position=chance.randrange(4))
            if len(order) > 100:
                popped.append(order.pop())
        return popped

    assert history() == history()
