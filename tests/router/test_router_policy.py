"""Each baseline does what its name says."""

from __future__ import annotations

from collections import Counter

import pytest
from route_fakes import IDLE, Pool, info, load, request

from cluster.config import RouterConfig

EIGHT = [f"r{number}" for number in range(8)]
POLICIES = RouterConfig.model_fields["policy"].annotation.__args__  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_and_names_each_candidate_once(policy: str) -> None:
    pool = Pool(EIGHT, policy=policy).cache(r3=[1, 2])
    for number in range(10):
        decision = pool.pick(request(160, [1, 2, number]))
        names = [candidate.replica_id for candidate in decision.candidates]
        assert len(set(names)) == len(names) <= 8
        pool.router.take()


@pytest.mark.parametrize("policy", [p for p in POLICIES if p not in ("round_robin",)])
def test_ties_do_not_all_go_to_the_first(policy: str) -> None:
    firsts = {
        Pool(EIGHT, policy=policy, seed=seed).pick(request(session=str(seed))).replica_id
        for seed in range(40)
    }
    assert len(firsts) >= 5


def test_random_spreads_whatever_the_load() -> None:
    pool = Pool({"a": load(work_s=50.0, num_running=50), "b": IDLE}, policy="random")
    counts = Counter(pool.pick(request()).replica_id for _ in range(400))
    assert 150 < counts["a"] < 250


def test_round_robin_takes_turns_as_replicas_come_and_go() -> None:
    pool = Pool({"a": IDLE, "c": load(work_s=9.0), "b": IDLE}, policy="round_robin")
    assert [pool.send(request()) for _ in range(4)] == ["a", "b", "c", "a"]
    pool.remove("b")
    assert [pool.send(request()) for _ in range(2)] == ["c", "a"]
    pool.add(info("b"))
    assert [pool.send(request()) for _ in range(3)] == ["b", "c", "a"]


def test_request_that_is_not_sent_leaves_no_memory() -> None:
    pool = Pool("abc", policy="round_robin")
    assert [pool.pick(request()).replica_id for _ in range(2)] == ["a", "a"]
    pool = Pool(EIGHT, policy="prefix_approx")
    pool.pick(request(64, [1, 2, 3, 4]))
    home = pool.send(request(64, [1, 2, 3, 4]))
    assert {pool.pick(request(64, [1, 2, 3, 4])).replica_id for _ in range(9)} == {home}
    unsent = {pool.pick(request(64, [5, 6, 7, 8])).replica_id for _ in range(40)}
    assert len(unsent) > 1


def test_least_requests_counts_those_of_this_gateway_that_have_not_ended() -> None:
    pool = Pool({"a": IDLE, "b": load(num_running=30, work_s=9.0)}, policy="least_requests")
    routes = [request(name=f"q{number}") for number in range(6)]
    went = {route.request_id: pool.send(route) for route in routes}
    assert Counter(went.values()) == {"a": 3, "b": 3}  # the others' requests are not seen
    for _ in range(3):
        pool.table.on_load("a", IDLE)  # reports change nothing
    for request_id, replica_id in went.items():
        if replica_id == "b":
            pool.table.on_end("b", request_id)
    assert [pool.send(request()) for _ in range(3)] == ["b"] * 3


def test_power_of_two_takes_the_shorter_of_two() -> None:
    loads = {name: load(num_running=number) for number, name in enumerate(EIGHT)}
    pool = Pool(loads, policy="power_of_two")
    counts = Counter(pool.pick(request()).replica_id for _ in range(1000))
    # The least busy of n wins whenever it is drawn: 2/n; the busiest one never.
    assert 200 < counts["r0"] < 300
    assert counts["r7"] == 0 and counts["r6"] > 0


def test_power_of_two_works_with_a_single_replica() -> None:
    assert Pool("a", policy="power_of_two").pick(request()).replica_id == "a"


def test_session_hash_sticks_to_a_replica_and_moves_few_when_one_leaves() -> None:
    pool = Pool(EIGHT, policy="session_hash")
    sessions = [f"s{number}" for number in range(400)]

    def homes() -> dict[str, str]:
        return {s: pool.pick(request(session=s)).replica_id for s in sessions}

    before = homes()
    assert homes() == before
    assert min(Counter(before.values()).values()) > 25
    pool.remove("r3")
    after = homes()
    moved = [s for s in sessions if after[s] != before[s]]
    assert moved == [s for s in sessions if before[s] == "r3"]


def test_session_hash_takes_the_head_of_the_prompt_where_there_is_no_session() -> None:
    pool = Pool(EIGHT, policy="session_hash")
    homes = {head: pool.pick(request(160, [head, 0, 1])).replica_id for head in range(50)}
    assert len(set(homes.values())) == 8
    for head, home in homes.items():
        assert pool.pick(request(160, [head, 0, 2])).replica_id == home


def test_session_hash_spreads_prompts_that_are_shorter_than_a_block() -> None:
    pool = Pool(EIGHT, policy="session_hash")
    homes = {pool.pick(request(5, [])).replica_id for _ in range(40)}
    assert len(homes) > 1


def test_prefix_approx_follows_where_it_sent_the_prefix() -> None:
    pool = Pool(EIGHT, policy="prefix_approx").cache(r0=[1, 2, 3, 4])  # it sees no events
    first = pool.send(request(64, [5, 6, 7, 8]))
    for number in range(5):
        assert pool.send(request(80, [5, 6, 7, 8, 100 + number])) == first
    others = {pool.send(request(80, [5, 900 + n, 800 + n, 700 + n])) for n in range(7)}
    assert first not in others  # less than half of it matches: the fewest requests


def test_prefix_approx_falls_back_when_out_of_balance() -> None:
    pool = Pool("ab", policy="prefix_approx")
    went = [pool.send(request(64, [1, 2, 3, 4])) for _ in range(60)]
    assert went[:33] == [went[0]] * 33
    assert Counter(went).most_common()[0][1] < 50


def test_least_tokens_does_not_see_the_cache() -> None:
    loads = {"a": load(num_queued_prefill_tokens=1), "b": IDLE}
    pool = Pool(loads, policy="least_tokens").cache(a=[1, 2, 3])
    assert pool.send(request(160, [1, 2, 3])) == "b"
    assert pool.send(request(160, [1, 2, 3])) == "a"  # what was sent counts


def test_prefix_weighs_the_cache_against_the_queue_in_tokens() -> None:
    def pick(queued_tokens: int) -> str:
        loads = {"a": load(num_queued_prefill_tokens=queued_tokens), "b": IDLE}
        return Pool(loads, policy="prefix").cache(a=[1, 2]).pick(request(160, [1, 2])).replica_id

    assert pick(31) == "a"
    assert pick(33) == "b"
