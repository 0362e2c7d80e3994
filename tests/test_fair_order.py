"""Whose turn it is among classes and tenants, by their weights, then by time."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.fair_order import FairOrder

WEIGHTS = {"gold": 3.0, "lead": 1.0}


@dataclass(frozen=True)
class Job:
    tenant: str = "t"
    tenant_weight: float = 1.0
    num_tokens: int = 10


Item = tuple[float, int, Job]


def _names(order: FairOrder[Job]) -> list[str]:
    return [job.tenant for job in order]


def test_order_of_one_tenant_is_by_due_time_then_serial() -> None:
    order: FairOrder[Job] = FairOrder(WEIGHTS, 1000)
    jobs = [Job(num_tokens=number) for number in range(4)]
    for due_s, serial in ((5.0, 0), (1.0, 3), (9.0, 1), (1.0, 2)):
        order.put("gold", (due_s, serial, jobs[serial]))
    assert [job.num_tokens for job in order] == [2, 3, 0, 1]
    order.take("gold", (1.0, 3, jobs[3]))
    assert [job.num_tokens for job in order] == [2, 0, 1]
    order.check_invariants()


def test_order_within_a_round_is_by_due_time_whoever_it_is() -> None:
    order: FairOrder[Job] = FairOrder(WEIGHTS, 1000)
    for serial, (name, tenant, due_s) in enumerate(
        [("gold", "a", 3.0), ("lead", "b", 1.0), ("gold", "c", 2.0), ("lead", "d", 4.0)]
    ):
        order.put(name, (due_s, serial, Job(tenant)))
    assert _names(order) == ["b", "c", "a", "d"]


def test_flood_of_one_tenant_yields_after_its_burst() -> None:
    order: FairOrder[Job] = FairOrder(WEIGHTS, 30)
    for serial in range(20):
        order.put("gold", (0.0, serial, Job("flood")))
    order.put("gold", (9.0, 20, Job("modest")))
    assert _names(order).index("modest") == 3


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_tenants_are_served_by_their_weights(weight: float) -> None:
    order: FairOrder[Job] = FairOrder(WEIGHTS, 40)
    waiting: dict[str, list[Item]] = {"one": [], "more": []}
    served: Counter[str] = Counter()
    serials = itertools.count()
    for _ in range(2000):
        for tenant, items in waiting.items():
            while len(items) < 2:  # there is always one more than is being served
                job = Job(tenant, weight if tenant == "more" else 1.0)
                items.append((0.0, next(serials), job))
                order.put("gold", items[-1])
        job = next(iter(order))
        order.charge("gold", job, job.num_tokens)
        order.take("gold", waiting[job.tenant].pop(0))
        served[job.tenant] += job.num_tokens
    assert served["more"] / served["one"] == pytest.approx(weight, rel=0.02)


def test_classes_are_served_by_their_weights_though_others_are_always_due_first() -> None:
    order: FairOrder[Job] = FairOrder(WEIGHTS, 40)
    served: Counter[str] = Counter()
    for serial in range(200):
        order.put("gold", (0.0, serial, Job("gold")))
        order.put("lead", (1e6, 1000 + serial, Job("lead")))
    for _ in range(190):
        job = next(iter(order))
        due_s = 0.0 if job.tenant == "gold" else 1e6
        first = min(item for name, item in order.items() if name == job.tenant)
        assert first[0] == due_s
        order.charge(job.tenant, job, job.num_tokens)
        order.take(job.tenant, first)
        served[job.tenant] += 1
    assert served["gold"] / served["lead"] == pytest.approx(3.0, rel=0.1)


def test_what_is_served_while_nobody_else_waits_is_no_debt() -> None:
    order: FairOrder[Job] = FairOrder(WEIGHTS, 20)
    order.put("gold", (0.0, 0, Job("a")))
    for _ in range(100):
        order.charge("gold", Job("a"), 1000)
    order.put("gold", (1.0, 1, Job("b")))
    order.put("lead", (2.0, 2, Job("c")))
    assert _names(order) == ["a", "b", "c"]


def test_what_is_served_while_others_wait_is() -> None:
    order: FairOrder[Job] = FairOrder(WEIGHTS, 20)
    order.put("gold", (5.0, 0, Job("waits")))
    order.charge("gold", Job("decodes"), 100)  # it has nothing that waits
    order.put("gold", (1.0, 1, Job("decodes")))
    assert _names(order) == ["waits", "decodes"]


def test_reading_the_order_is_not_disturbed_by_what_is_taken_meanwhile() -> None:
    order: FairOrder[Job] = FairOrder(WEIGHTS, 1000)
    items = [(float(serial), serial, Job(f"t{serial % 3}")) for serial in range(9)]
    for item in items:
        order.put("gold", item)
    seen = []
    for job, item in zip(order, items, strict=True):
        seen.append(job)
        order.take("gold", item)
        order.charge("gold", job, job.num_tokens)
    assert seen == [item[2] for item in items]
    assert list(order) == []


class FairOrderMachine(RuleBasedStateMachine):
    """Puts, takes and charges in any order; what waits is all there, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.order: FairOrder[Job] = FairOrder({**WEIGHTS, "late": 0.1}, 25)
        self.items: list[tuple[str, Item]] = []
        self.serial = 0

    @rule(
        name=st.sampled_from(["gold", "lead", "late"]),
        tenant=st.sampled_from("abc"),
        due_s=st.floats(-10, 10),
        num_tokens=st.integers(1, 100),
    )
    def put(self, name: str, tenant: str, due_s: float, num_tokens: int) -> None:
        item = (due_s, self.serial, Job(tenant, {"a": 1.0, "b": 0.5, "c": 7.0}[tenant], num_tokens))
        self.serial += 1
        self.order.put(name, item)
        self.items.append((name, item))

    @rule(data=st.data(), is_served=st.booleans())
    def take(self, data: st.DataObject, is_served: bool) -> None:
        if self.items:
            name, item = self.items.pop(data.draw(st.integers(0, len(self.items) - 1)))
            if is_served:
                self.order.charge(name, item[2], item[2].num_tokens)
            self.order.take(name, item)

    @rule(name=st.sampled_from(["gold", "lead"]), tenant=st.sampled_from("abc"))
    def charge(self, name: str, tenant: str) -> None:
        self.order.charge(name, Job(tenant), 16)

    @invariant()
    def is_sound(self) -> None:
        self.order.check_invariants()
        assert sorted(map(id, self.order)) == sorted(id(item[2]) for _, item in self.items)
        assert sorted(self.order.items(), key=lambda e: e[1][1]) == self.items

    @invariant()
    def is_in_order_of_due_times_per_tenant(self) -> None:
        place = {id(job): number for number, job in enumerate(self.order)}
        by_tenant: dict[tuple[str, str], list[Item]] = {}
        for name, item in self.items:
            by_tenant.setdefault((name, item[2].tenant), []).append(item)
        for items in by_tenant.values():
            ordered = sorted(items, key=lambda item: item[:2])
            places = [place[id(item[2])] for item in ordered]
            assert places == sorted(places)


TestFairOrderMachine = FairOrderMachine.TestCase
TestFairOrderMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
