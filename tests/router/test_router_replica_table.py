"""The columns say what was reported and what was sent since, row by row."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, rule
from route_fakes import IDLE, info, load

from cluster.router.replica_table import ReplicaTable, Sent
from cluster.types import MAX_DUE_WORKS, DueWork, ReplicaLoad

NAMES = st.sampled_from([f"r{number}" for number in range(20)])


def sent(num_tokens: int = 100, *, work_s: float = 1.0, due_s: float = math.inf) -> Sent:
    return Sent(num_tokens, num_blocks=2, work_s=work_s, due_s=due_s)


def of(table: ReplicaTable, name: str, replica_id: str = "a") -> float:
    row = table.row_of(replica_id)
    assert row is not None
    return float(table.column(name)[row])


def work(table: ReplicaTable, due_s: float, now_s: float = 0.0, replica_id: str = "a") -> float:
    row = table.row_of(replica_id)
    assert row is not None
    return float(table.work_before(due_s, now_s)[row])


def test_last_row_moves_into_the_place_of_one_that_leaves() -> None:
    table = ReplicaTable()
    for number, name in enumerate("abc", start=1):
        its_load = load(work_s=float(number), num_running=number)
        table.add(info(name, fingerprint=name), its_load)
    table.on_submit("c", "x", sent(7, work_s=10.0))
    version = table.version
    table.remove("a")
    assert (table.ids, [kind[0] for kind in table.kinds]) == (["c", "b"], ["c", "b"])
    assert table.column("num_requests").tolist() == [3, 2]
    assert table.column("sent_tokens").tolist() == [7, 0]
    assert table.work_before(math.inf, 0.0).tolist() == [13.0, 2.0]
    assert table.work_before(5.0, 0.0).tolist() == [3.0, 2.0]
    assert table.version != version
    table.on_end("c", "x")
    assert table.column("sent_tokens").tolist() == [0, 0]
    table.check_invariants()


def test_row_of_one_that_left_keeps_nothing_for_the_next() -> None:
    table = ReplicaTable()
    table.add(info("a"), load(work_s=5.0, num_waiting=4, late_s=3.0))
    table.on_submit("a", "x", sent())
    table.on_first_token("a", predicted_s=1.0, actual_s=9.0)
    table.remove("a")
    table.add(info("b"), ReplicaLoad())
    assert table.work_before(math.inf, 0.0).tolist() == [0.0]
    for name in ("num_waiting", "num_sent", "sent_tokens", "sent_blocks", "num_open"):
        assert of(table, name, "b") == 0, name
    assert of(table, "median", "b") == 1.0


def test_more_rows_than_at_first_keep_their_figures() -> None:
    table = ReplicaTable()
    for number in range(40):
        table.add(info(f"r{number}"), load(work_s=1.0 + number, num_running=number))
    assert table.column("num_requests").tolist() == list(range(40))
    assert table.work_before(math.inf, 0.0).tolist() == [1.0 + number for number in range(40)]
    table.check_invariants()


def test_sent_requests_count_until_a_report_must_contain_them() -> None:
    table = ReplicaTable()
    table.add(info("a"), IDLE)
    table.on_submit("a", "r1", sent(100))
    table.on_load("a", IDLE)
    table.on_submit("a", "r2", sent(10))
    assert (of(table, "num_sent"), of(table, "sent_tokens"), of(table, "sent_blocks")) == (
        2,
        110,
        4,
    )
    table.on_load("a", IDLE)
    assert (of(table, "num_sent"), of(table, "sent_tokens"), of(table, "sent_blocks")) == (1, 10, 2)
    table.on_load("a", IDLE)
    assert (of(table, "num_sent"), of(table, "sent_tokens"), of(table, "sent_blocks")) == (0, 0, 0)
    assert work(table, math.inf) == 0.0


def test_request_that_ends_counts_no_more_wherever_it_stood() -> None:
    table = ReplicaTable()
    table.add(info("a"), IDLE)
    table.on_submit("a", "settling", sent(100))
    table.on_load("a", IDLE)
    table.on_submit("a", "fresh", sent(10))
    for request_id in ("settling", "fresh", "unknown"):
        table.on_end("a", request_id)
    for name in ("num_sent", "sent_tokens", "sent_blocks", "sent_s", "num_open"):
        assert of(table, name) == 0, name


def test_open_requests_are_those_that_have_not_ended() -> None:
    table = ReplicaTable()
    table.add(info("a"), IDLE)
    table.on_submit("a", "x", sent())
    table.on_submit("a", "y", sent())
    for _ in range(3):
        table.on_load("a", IDLE)
    assert of(table, "num_open") == 2
    table.on_end("a", "x")
    assert of(table, "num_open") == 1


def test_replica_that_comes_back_starts_without_what_was_sent_before() -> None:
    table = ReplicaTable()
    table.add(info("a"), IDLE)
    table.on_submit("a", "x", sent())
    table.add(info("a"), IDLE)
    assert (of(table, "num_sent"), of(table, "num_open"), len(table)) == (0, 0, 1)
    table.on_end("a", "x")
    table.check_invariants()


def test_work_before_counts_what_is_due_no_later() -> None:
    table = ReplicaTable()
    due = (DueWork(-1.0, 1.0), DueWork(2.0, 10.0), DueWork(5.0, 100.0))
    table.add(info("a"), load(late_s=1000.0))
    table.on_load("a", ReplicaLoad(due=due, late_s=1000.0), now_s=50.0)
    assert work(table, 51.9, 50.0) == 1.0
    assert work(table, 52.0, 50.0) == 11.0
    assert work(table, 55.0, 50.0) == 111.0
    assert work(table, math.inf, 50.0) == 1111.0


def test_work_before_takes_off_what_was_done_since_the_report() -> None:
    table = ReplicaTable()
    table.add(info("a"), load(work_s=3.0, due_s=2.0), now_s=10.0)
    table.on_submit("a", "x", sent(work_s=0.5, due_s=11.0))
    assert work(table, 12.0, 10.0) == 3.5
    assert work(table, 12.0, 11.0) == 2.5
    assert work(table, 12.0, 99.0) == 0.5  # what was sent since has not been reported done
    table.on_load("a", load(work_s=3.0, due_s=2.0), now_s=99.0)
    assert work(table, 101.0, 99.0) == 3.5


def test_work_before_counts_sent_requests_by_when_they_are_due() -> None:
    table = ReplicaTable()
    table.add(info("a"), IDLE)
    table.on_submit("a", "soon", sent(work_s=1.0, due_s=1.0))
    table.on_submit("a", "later", sent(work_s=10.0, due_s=5.0))
    table.on_submit("a", "whenever", sent(work_s=100.0))
    assert [work(table, due_s) for due_s in (0.5, 1.0, 5.0, math.inf)] == [0.0, 1.0, 11.0, 111.0]


def test_work_before_forgets_no_request_of_many() -> None:
    table = ReplicaTable()
    table.add(info("a"), IDLE)
    for number in range(100):
        table.on_submit("a", str(number), sent(work_s=1.0, due_s=9.0))
    assert work(table, math.inf) == work(table, 9.0) == 100.0
    for number in range(99):
        table.on_end("a", str(number))
    assert (work(table, math.inf), work(table, 9.0), work(table, 8.0)) == (1.0, 1.0, 0.0)


def test_report_of_unknown_replica_is_ignored() -> None:
    table = ReplicaTable()
    assert not table.on_load("a", load(is_draining=True))
    table.on_submit("a", "x", sent())
    table.on_end("a", "x")
    table.on_first_token("a", predicted_s=1.0, actual_s=2.0)
    table.remove("a")
    assert len(table) == 0 and "a" not in table and table.row_of("a") is None


def test_report_tells_when_a_replica_begins_and_ends_to_drain() -> None:
    table = ReplicaTable()
    table.add(info("a"), IDLE)
    drains = [table.on_load("a", load(is_draining=d)) for d in (False, True, True, False)]
    assert drains == [False, True, False, True]
    assert of(table, "is_open") == 1


def test_median_follows_the_first_tokens_of_its_replica() -> None:
    table = ReplicaTable()
    table.add(info("a"), IDLE)
    table.add(info("b"), IDLE)
    for _ in range(20):
        table.on_first_token("a", predicted_s=1.0, actual_s=3.0)
    assert of(table, "median") == pytest.approx(3.0, rel=0.05)
    assert of(table, "median", "b") == 1.0


def test_snapshots_are_ordered_by_id() -> None:
    table = ReplicaTable()
    for replica_id in ("b", "a", "c"):
        table.add(info(replica_id), IDLE)
    table.on_submit("a", "x", sent(7))
    snapshots = table.snapshots()
    assert [s.info.replica_id for s in snapshots] == ["a", "b", "c"]
    assert [s.num_inflight for s in snapshots] == [1, 0, 0]
    assert snapshots[0].num_inflight_prefill_tokens == 7


class _Model:
    """What a row has to say, kept the plain way."""

    def __init__(self, num_running: int) -> None:
        self.num_running = num_running
        self.sent: dict[str, tuple[int, Sent]] = {}  # reports since then, what was sent
        self.open: set[str] = set()


class TableMachine(RuleBasedStateMachine):
    """Replicas come, go and report; requests are sent, end, or are never heard of again."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ReplicaTable()
        self.models: dict[str, _Model] = {}
        self.num_requests = 0

    @rule(name=NAMES, num_running=st.integers(0, 9))
    def add(self, name: str, num_running: int) -> None:
        self.table.add(info(name), load(num_running=num_running))
        self.models[name] = _Model(num_running)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.table.remove(name)
        self.models.pop(name, None)

    @rule(name=NAMES, num_running=st.integers(0, 9))
    def on_load(self, name: str, num_running: int) -> None:
        self.table.on_load(name, load(num_running=num_running))
        if name in self.models:
            model = self.models[name]
            model.num_running = num_running
            aged = {key: (age + 1, item) for key, (age, item) in model.sent.items()}
            model.sent = {key: entry for key, entry in aged.items() if entry[0] < 2}

    @rule(name=NAMES, num_tokens=st.integers(1, 9), number=st.integers(1, 20))
    def on_submit(self, name: str, num_tokens: int, number: int) -> None:
        for _ in range(number):
            request_id, self.num_requests = f"q{self.num_requests}", self.num_requests + 1
            item = sent(num_tokens, work_s=float(num_tokens), due_s=5.0)
            self.table.on_submit(name, request_id, item)
            if name in self.models:
                self.models[name].sent[request_id] = (0, item)
                self.models[name].open.add(request_id)

    @rule(name=NAMES, data=st.data())
    def on_end(self, name: str, data: st.DataObject) -> None:
        ids = sorted(self.models[name].open) if name in self.models else []
        request_id = data.draw(st.sampled_from([*ids, "unknown"]))
        self.table.on_end(name, request_id)
        if ids:
            self.models[name].sent.pop(request_id, None)
            self.models[name].open.discard(request_id)

    def teardown(self) -> None:
        self.table.check_invariants()
        assert set(self.table.ids) == set(self.models)
        expected = [self.figures(self.models[name]) for name in self.table.ids]
        for column, values in zip(_FIGURES, zip(*expected, strict=True), strict=False):
            assert np.array_equal(self.table.column(column), values), column
        for due_s in (5.0, math.inf):
            work_s = self.table.work_before(due_s, 0.0)
            assert work_s.tolist() == [figures[2] for figures in expected]
        for _ in range(2):
            for name in self.models:
                self.table.on_load(name, IDLE)
        assert not self.table.column("num_sent").any(), "a lost answer left a count"
        assert not self.table.work_before(math.inf, 0.0).any()

    def figures(self, model: _Model) -> tuple[Any, ...]:
        items = [item for _, item in model.sent.values()]
        num_tokens = sum(item.num_tokens for item in items)
        num_blocks = sum(item.num_blocks for item in items)
        return model.num_running, len(items), num_tokens, num_blocks, len(model.open)


_FIGURES = ("num_requests", "num_sent", "sent_tokens", "sent_blocks", "num_open")

TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_report_with_as_many_due_times_as_there_may_be() -> None:
    table = ReplicaTable()
    due = tuple(DueWork(float(number), 1.0) for number in range(MAX_DUE_WORKS))
    table.add(info("a"), ReplicaLoad(due=due))
    assert work(table, 7.0) == 8.0
    assert work(table, math.inf) == MAX_DUE_WORKS
