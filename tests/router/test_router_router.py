from __future__ import annotations

import pytest

from cluster.config import RouterConfig
from cluster.router.prefix_index import PrefixIndex
from cluster.router.replica_table import ReplicaTable
from cluster.router.router import Router
from cluster.types import ReplicaInfo, ReplicaLoad, ReplicaSnapshot

BLOCK_SIZE = 16


def _replica(
    replica_id: str, load: ReplicaLoad | None = None, inflight: int = 0, prefill: int = 0
) -> ReplicaSnapshot:
    info = ReplicaInfo(replica_id, "host:1", "m", "f", 1, 1, BLOCK_SIZE, 1024)
    return ReplicaSnapshot(info, load or ReplicaLoad(), inflight, prefill)


def _index(**blocks: list[int]) -> PrefixIndex:
    index = PrefixIndex()
    for replica_id, keys in blocks.items():
        index.replace(replica_id, keys)
    return index


def _pick(router: Router, replicas: list[ReplicaSnapshot], index: PrefixIndex | None = None) -> str:
    decision = router.pick([1, 2, 3, 4], 64, replicas, index or PrefixIndex())
    assert decision is not None
    return decision.replica_id


def test_pick_takes_the_longest_cached_prefix() -> None:
    replicas = [_replica("a"), _replica("b"), _replica("c")]
    assert _pick(Router(RouterConfig()), replicas, _index(a=[1], b=[1, 2, 3], c=[2, 3, 4])) == "b"


def test_pick_prefers_idle_over_cached_where_the_queue_outweighs_the_prefix() -> None:
    router, index = Router(RouterConfig()), _index(a=[1, 2])
    assert _pick(router, [_replica("a", ReplicaLoad()), _replica("b")], index) == "a"
    busy = ReplicaLoad(num_queued_prefill_tokens=2 * BLOCK_SIZE + 1)
    assert _pick(router, [_replica("a", busy), _replica("b")], index) == "b"


def test_pick_weighs_running_waiting_and_inflight() -> None:
    router = Router(RouterConfig(running_cost_tokens=10, waiting_cost_tokens=25))
    decision = router.pick(
        [],
        5,
        [
            _replica("running", ReplicaLoad(num_running=2)),
            _replica("waiting", ReplicaLoad(num_waiting=1)),
            _replica("inflight", inflight=1, prefill=3),
        ],
        PrefixIndex(),
    )
    assert decision is not None
    assert {c.replica_id: c.score for c in decision.candidates} == {
        "running": 25,
        "waiting": 30,
        "inflight": 33,
    }
    assert decision.chosen.num_uncached_tokens == 5


def test_pick_passes_over_draining_replicas() -> None:
    router = Router(RouterConfig())
    draining = _replica("a", ReplicaLoad(is_draining=True))
    assert _pick(router, [draining, _replica("b", ReplicaLoad(num_running=9))]) == "b"
    assert router.pick([], 1, [draining], PrefixIndex()) is None
    assert router.pick([], 1, [], PrefixIndex()) is None


def test_pick_breaks_ties_by_inflight_then_id() -> None:
    router = Router(RouterConfig(running_cost_tokens=64, waiting_cost_tokens=64))
    one_running, one_sent = _replica("b", ReplicaLoad(num_running=1)), _replica("a", inflight=1)
    assert _pick(router, [one_sent, one_running]) == "b"
    assert _pick(router, [_replica("z"), _replica("y")]) == "y"


def test_pick_of_a_fully_cached_prompt_still_computes_one_token() -> None:
    decision = Router(RouterConfig()).pick(
        [1, 2], 2 * BLOCK_SIZE, [_replica("a")], _index(a=[1, 2])
    )
    assert decision is not None
    assert decision.num_cached_blocks == 2
    assert decision.chosen.num_uncached_tokens == 1


def test_least_tokens_ignores_the_cache() -> None:
    router = Router(RouterConfig(policy="least_tokens"))
    replicas = [_replica("a", ReplicaLoad(num_queued_prefill_tokens=1)), _replica("b")]
    assert _pick(router, replicas, _index(a=[1, 2, 3, 4])) == "b"


def test_round_robin_takes_turns_as_replicas_come_and_go() -> None:
    router = Router(RouterConfig(policy="round_robin"))
    three = [_replica("a"), _replica("b", ReplicaLoad(num_running=50)), _replica("c")]
    assert [_pick(router, three) for _ in range(4)] == ["a", "b", "c", "a"]
    assert [_pick(router, [three[0], three[2]]) for _ in range(2)] == ["c", "a"]


@pytest.mark.parametrize("num_requests", [12, 100])
def test_burst_between_two_load_reports_is_spread(num_requests: int) -> None:
    router, table = Router(RouterConfig()), ReplicaTable()
    for replica_id in ("a", "b", "c", "d"):
        table.add(_replica(replica_id).info, ReplicaLoad())
    counts = dict.fromkeys("abcd", 0)
    for number in range(num_requests):
        decision = router.pick([1, 2, 3, 4], 64, table.snapshots(), PrefixIndex())
        assert decision is not None
        counts[decision.replica_id] += 1
        table.on_submit(decision.replica_id, f"r{number}", decision.chosen.num_uncached_tokens)
    assert max(counts.values()) == num_requests // 4


def test_hot_prefix_does_not_drown_its_replica() -> None:
    router, table, index = Router(RouterConfig()), ReplicaTable(), _index(a=[1, 2, 3, 4])
    for replica_id in ("a", "b"):
        table.add(_replica(replica_id).info, ReplicaLoad())
    counts = {"a": 0, "b": 0}
    for number in range(40):
        decision = router.pick([1, 2, 3, 4], 64, table.snapshots(), index)
        assert decision is not None
        counts[decision.replica_id] += 1
        table.on_submit(decision.replica_id, f"r{number}", decision.chosen.num_uncached_tokens)
    assert counts["a"] > counts["b"] > 10
