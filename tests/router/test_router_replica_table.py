from __future__ import annotations

from cluster.router.replica_table import ReplicaTable
from cluster.types import ReplicaInfo, ReplicaLoad


def _info(replica_id: str) -> ReplicaInfo:
    return ReplicaInfo(replica_id, "host:1", "m", "f", 1, 1, 16, 1024)


def _inflight(table: ReplicaTable) -> tuple[int, int]:
    (snapshot,) = table.snapshots()
    return snapshot.num_inflight, snapshot.num_inflight_prefill_tokens


def test_snapshots_are_ordered_by_id() -> None:
    table = ReplicaTable()
    for replica_id in ("b", "a", "c"):
        table.add(_info(replica_id), ReplicaLoad())
    assert [s.info.replica_id for s in table.snapshots()] == ["a", "b", "c"]


def test_sent_requests_count_until_a_report_must_contain_them() -> None:
    table = ReplicaTable()
    table.add(_info("a"), ReplicaLoad())
    table.on_submit("a", "r1", 100)
    table.on_load("a", ReplicaLoad(num_running=1))
    table.on_submit("a", "r2", 10)
    assert _inflight(table) == (2, 110)
    table.on_load("a", ReplicaLoad(num_running=2))
    assert _inflight(table) == (1, 10)
    table.on_load("a", ReplicaLoad(num_running=3))
    assert _inflight(table) == (0, 0)


def test_request_that_left_no_trace_in_the_reports_is_forgotten_all_the_same() -> None:
    table = ReplicaTable()
    table.add(_info("a"), ReplicaLoad())
    table.on_submit("a", "r1", 100)
    for _ in range(2):
        table.on_load("a", ReplicaLoad())
    assert _inflight(table) == (0, 0)


def test_request_that_has_ended_counts_no_more() -> None:
    table = ReplicaTable()
    table.add(_info("a"), ReplicaLoad())
    table.on_submit("a", "r1", 100)
    table.on_submit("a", "r2", 10)
    table.on_end("a", "r1")
    assert _inflight(table) == (1, 10)
    table.on_load("a", ReplicaLoad(num_running=1))
    table.on_end("a", "r2")
    assert _inflight(table) == (0, 0)


def test_reconnected_replica_starts_without_inflight() -> None:
    table = ReplicaTable()
    table.add(_info("a"), ReplicaLoad())
    table.on_submit("a", "r1", 100)
    table.add(_info("a"), ReplicaLoad())
    assert _inflight(table) == (0, 0)


def test_unknown_replicas_are_ignored() -> None:
    table = ReplicaTable()
    table.on_load("a", ReplicaLoad())
    table.on_submit("a", "r1", 1)
    table.on_end("a", "r1")
    table.remove("a")
    assert len(table) == 0
    assert "a" not in table
