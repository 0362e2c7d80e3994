"""Filter, score, pick: who can take a request, and what is told of the decision."""

from __future__ import annotations

import random

import pytest
from route_fakes import BLOCK_SIZE, IDLE, Pool, info, load, request

from cluster.config import RouterConfig
from cluster.router.prefix_index import PrefixIndex
from cluster.router.replica_table import ReplicaTable
from cluster.router.router import Router


def _none(pool: Pool, **kwargs: object) -> bool:
    route = request(**kwargs)  # type: ignore[arg-type]
    return pool.router.pick(route, pool.table, pool.index, 0.0) is None


def test_router_without_replicas_picks_none() -> None:
    router = Router(RouterConfig(), random.Random(0))
    assert router.pick(request(), ReplicaTable(), PrefixIndex(), 0.0) is None


def test_router_passes_over_draining_replicas() -> None:
    pool = Pool({"a": load(is_draining=True), "b": load(work_s=9.0)})
    decision = pool.pick(request())
    assert (decision.replica_id, decision.num_candidates, decision.num_excluded) == ("b", 1, 1)
    pool.table.on_load("b", load(is_draining=True))
    assert _none(pool)
    pool.table.on_load("a", IDLE)
    assert pool.pick(request()).replica_id == "a"


def test_router_takes_replicas_of_the_model_that_is_asked_for() -> None:
    pool = Pool()
    pool.add(info("a", model="small"))
    pool.add(info("b", model="large"), load(work_s=5.0))
    assert pool.pick(request(model="large")).replica_id == "b"
    assert pool.pick(request()).replica_id == "a"
    assert _none(pool, model="unknown")


def test_router_sends_no_prompt_that_leaves_no_room_for_an_answer() -> None:
    pool = Pool()
    pool.add(info("short", max_model_len=100))
    pool.add(info("long", max_model_len=1000), load(work_s=5.0))
    assert pool.pick(request(99)).replica_id == "short"
    assert pool.pick(request(100)).replica_id == "long"
    assert _none(pool, num_tokens=1000)


def test_router_knows_a_prompt_by_other_keys_on_other_kinds_of_replicas() -> None:
    pool = Pool()
    pool.add(info("a", fingerprint="bf16", block_size=16), keys=[1, 2])
    pool.add(info("b", fingerprint="int8", block_size=32), keys=[71, 72])
    pool.add(info("c", fingerprint="int8", block_size=32), keys=[1, 2])
    route = request(100, {"bf16": [1, 2, 3, 4, 5, 6], "int8": [71, 72, 73]})
    cached = {c.replica_id: c.num_cached_tokens for c in pool.pick(route).candidates}
    assert cached == {"a": 32, "b": 64, "c": 0}


def test_router_follows_replicas_that_come_go_and_come_back() -> None:
    pool = Pool("ab").cache(a=[1, 2, 3], b=[9])
    route = request(100, [1, 2, 3])
    assert pool.pick(route).chosen.num_cached_tokens == 48
    pool.remove("a")
    assert [c.num_cached_tokens for c in pool.pick(route).candidates] == [0]
    pool.add(info("c"), keys=[1])
    pool.add(info("a"), keys=[1, 2])
    cached = {c.replica_id: c.num_cached_tokens for c in pool.pick(route).candidates}
    assert cached == {"a": 32, "b": 0, "c": 16}


def test_router_computes_the_last_token_of_a_cached_prompt() -> None:
    chosen = Pool("a").cache(a=[1, 2]).pick(request(2 * BLOCK_SIZE, [1, 2])).chosen
    assert (chosen.num_cached_tokens, chosen.num_uncached_tokens) == (2 * BLOCK_SIZE - 1, 1)


def test_router_names_the_chosen_one_first_and_few_others() -> None:
    pool = Pool({f"r{number:02}": load(work_s=1.0 + number) for number in range(20)})
    decision = pool.pick(request())
    assert decision.replica_id == decision.candidates[0].replica_id == "r00"
    names = [candidate.replica_id for candidate in decision.candidates]
    assert names == [f"r{number:02}" for number in range(len(names))]
    assert 2 <= len(names) <= 8
    assert (decision.num_candidates, decision.num_excluded) == (20, 0)
    scores = [candidate.score for candidate in decision.candidates]
    assert scores == sorted(scores)


@pytest.mark.parametrize("policy", ["slo", "prefix", "random", "power_of_two", "session_hash"])
def test_router_is_deterministic_per_seed(policy: str) -> None:
    def picks(seed: int) -> list[str]:
        pool = Pool([f"r{number}" for number in range(8)], policy=policy, seed=seed)
        routes = [request(160, [number % 3], session=str(number)) for number in range(30)]
        return [pool.send(route) for route in routes]

    assert picks(1) == picks(1)
    if policy != "session_hash":
        assert picks(1) != picks(2)
