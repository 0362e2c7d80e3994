"""The policy that predicts: where a request goes, and that no two gateways make a herd."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from dataclasses import replace

import pytest
from route_fakes import BLOCK_SIZE, IDLE, TOKEN_S, Pool, info, load, request

from cluster.types import DueWork, ReplicaLoad

EIGHT = [f"r{number}" for number in range(8)]
LONG = list(range(1, 65))  # keys of 1,024 tokens


def test_slo_weighs_the_cached_prefix_against_the_queue() -> None:
    def pick(work_s: float) -> str:
        pool = Pool({"a": load(work_s=work_s), "b": IDLE}).cache(a=LONG)
        return pool.pick(request(1100, [*LONG, 99, 98], ttft_s=100.0)).replica_id

    assert pick(0.0) == "a"
    assert pick(0.5) == "a"
    assert pick(20.0) == "b"


def test_slo_takes_the_longest_cached_prefix_of_idle_replicas() -> None:
    pool = Pool("abc").cache(a=LONG[:8], b=LONG[:32], c=LONG[1:])
    assert pool.pick(request(1100, [*LONG, 99])).replica_id == "b"


def test_slo_takes_the_faster_replica() -> None:
    loads = {"slow": load(prefill_token_s=2e-3), "fast": load(prefill_token_s=1e-3)}
    for seed in range(20):
        assert Pool(loads, seed=seed).pick(request(500)).replica_id == "fast"


def test_slo_leaves_the_cached_prefix_where_it_would_miss_the_objective() -> None:
    pool = Pool({"a": load(work_s=2.0, due_s=0.5), "b": IDLE}).cache(a=LONG)
    decision = pool.pick(request(1100, LONG, ttft_s=1.5))
    assert (decision.replica_id, decision.meets_slo) == ("b", True)
    # What is queued there but due later does not stand in its way.
    pool = Pool({"a": load(work_s=2.0, due_s=9.0), "b": IDLE}).cache(a=LONG)
    decision = pool.pick(request(1100, LONG, ttft_s=1.5))
    assert (decision.replica_id, decision.meets_slo) == ("a", True)


def test_slo_takes_a_replica_that_misses_only_if_none_keeps_the_objective() -> None:
    rng = random.Random(0)
    for _ in range(200):
        loads = {
            name: load(
                work_s=rng.uniform(0, 3), due_s=rng.uniform(0, 3), num_running=rng.randrange(9)
            )
            for name in EIGHT
        }
        pool = Pool(loads, seed=rng.randrange(99))
        pool.cache(**{name: LONG[: rng.randrange(64)] for name in EIGHT})
        route = request(1100, LONG, ttft_s=rng.uniform(0.05, 2.0))
        view = pool.view(route)
        assert pool.pick(route).meets_slo == view.is_in_time.any()


def test_slo_takes_a_replica_whose_memory_is_full_last() -> None:
    full = load(num_free_blocks=0, num_waiting=3)
    pool = Pool({"full": full, "busy": load(work_s=5.0)}).cache(full=LONG)
    decision = pool.pick(request(1100, LONG))
    assert decision.replica_id == "busy" and not decision.is_full
    assert Pool({"full": full}).pick(request()).is_full


def test_slo_eight_arrivals_on_stale_state_go_to_eight_equal_replicas() -> None:
    for seed in range(20):
        pool = Pool(EIGHT, seed=seed)
        assert sorted(pool.send(request(500)) for _ in range(8)) == EIGHT


def test_slo_eight_arrivals_with_a_prefix_that_all_have_spread_too() -> None:
    for seed in range(20):
        pool = Pool(EIGHT, seed=seed).cache(**dict.fromkeys(EIGHT, LONG))
        went = [pool.send(request(1200, [*LONG, 1000 + n], ttft_s=2.0)) for n in range(8)]
        assert sorted(went) == EIGHT


def test_slo_gateways_on_the_same_state_do_not_all_choose_the_same() -> None:
    firsts = Counter(Pool(EIGHT, seed=seed).pick(request(500)).replica_id for seed in range(64))
    assert len(firsts) >= 6 and max(firsts.values()) <= 20


def test_slo_of_two_that_are_nearly_equal_takes_the_less_busy() -> None:
    loads = {"a": load(num_running=9), "b": load(num_running=1)}
    assert {Pool(loads, seed=seed).pick(request(500)).replica_id for seed in range(20)} == {"b"}


def test_slo_hot_prefix_is_counted_by_the_blocks_that_are_shared() -> None:
    """Also where the first replica of the table knows the prompt by blocks of another size."""
    pool = Pool()
    pool.add(info("a", fingerprint="large", block_size=4 * BLOCK_SIZE), load(work_s=50.0))
    pool.add(info("b", fingerprint="small"), keys=LONG[:4])
    for number in range(5):
        own = list(range(1000 * number, 1000 * number + 60))
        keys = {"small": [*LONG[:4], *own], "large": [LONG[0], *own[:15]]}
        pool.send(request(64 * BLOCK_SIZE, keys))
    hot = pool.router._policy._hot  # type: ignore[attr-defined]
    assert max(uses for uses, _ in hot._uses.values()) == pytest.approx(5.0)


def test_slo_hot_prefix_is_worth_a_copy_where_a_cool_one_is_not() -> None:
    pool = Pool({"a": load(work_s=0.5, due_s=0.0), "b": IDLE}).cache(a=LONG)
    went = []
    for number in range(20):
        route = request(1100, [*LONG, 1000 + number], ttft_s=9.0)
        went.append(pool.send(route))
        pool.table.on_end(went[-1], route.request_id)
    assert went[:2] == ["a", "a"]
    assert went[-1] == "b"
    # When nobody has asked for it for long, it is worth none again.
    pool.table.on_load("a", load(work_s=0.5, due_s=0.0), now_s=1e4)
    assert pool.pick(request(1100, [*LONG, 7], ttft_s=9.0, arrived_s=1e4), 1e4).replica_id == "a"


class _Replica:
    """Computes one prompt after the other and keeps every prefix."""

    def __init__(self) -> None:
        self.assigned_s = 0.0
        self.queue: deque[tuple[float, list[int]]] = deque()  # seconds left, keys
        self.cached: dict[int, None] = {}
        self.events: list[int] = []

    def take(self, num_tokens: int, keys: list[int]) -> None:
        known = 0
        while known < len(keys) and keys[known] in self.cached:
            known += 1
        work_s = (num_tokens - known * BLOCK_SIZE) * TOKEN_S
        self.assigned_s += work_s
        self.queue.append((work_s, keys))

    def run(self, seconds: float) -> None:
        while self.queue and seconds > 0:
            left_s, keys = self.queue.popleft()
            if left_s > seconds:
                self.queue.appendleft((left_s - seconds, keys))
                return
            seconds -= left_s
            self.events += [key for key in keys if key not in self.cached]
            self.cached.update(dict.fromkeys(keys))

    def load(self) -> ReplicaLoad:
        work_s = sum(left_s for left_s, _ in self.queue)
        due = (DueWork(1.0, work_s),) if work_s else ()
        tokens = int(work_s / TOKEN_S)
        return replace(IDLE, due=due, num_running=len(self.queue), num_queued_prefill_tokens=tokens)


def _run(rate_per_s: float, *, background_per_s: float, seconds: float = 60.0) -> list[float]:
    """Return the work assigned to each of eight replicas; their caches are known 0.1 s late."""
    pool, rng = Pool(EIGHT), random.Random(1)
    replicas = {name: _Replica() for name in EIGHT}
    step_s, serial = 0.1, 10**6
    for tick in range(round(seconds / step_s)):
        now_s = tick * step_s
        for name, replica in replicas.items():
            pool.index.apply(name, added=replica.events, removed=())
            replica.events = []
            pool.table.on_load(name, replica.load(), now_s=now_s)
        for rate, is_hot in ((rate_per_s, True), (background_per_s, False)):
            num = int(rate * step_s) + (rng.random() < rate * step_s % 1)
            for _ in range(num):
                serial += 100
                own = list(range(serial, serial + 8))
                keys = [*LONG, *own] if is_hot else own
                num_tokens = len(keys) * BLOCK_SIZE + 1
                route = request(num_tokens, keys, ttft_s=2.0, arrived_s=now_s)
                replicas[pool.send(route, now_s)].take(num_tokens, keys)
        for replica in replicas.values():
            replica.run(step_s)
        if now_s < 10.0:  # copies are being made
            for replica in replicas.values():
                replica.assigned_s = 0.0
    return [replica.assigned_s for replica in replicas.values()]


def _spread(work: list[float]) -> float:
    return max(work) * len(work) / math.fsum(work)


@pytest.mark.parametrize("background_per_s", [0.0, 20.0])
def test_slo_hot_prefix_at_twice_a_replicas_capacity_is_copied(background_per_s: float) -> None:
    capacity_per_s = 1 / (8 * BLOCK_SIZE * TOKEN_S + TOKEN_S)
    work = _run(2 * capacity_per_s, background_per_s=background_per_s)
    assert _spread(work) <= 1.3, work


def test_slo_prefixes_that_are_not_hot_are_not_copied() -> None:
    pool, rng = Pool(EIGHT), random.Random(2)
    homes: dict[int, set[str]] = {}
    for number in range(400):
        session = rng.randrange(40)
        keys = [100 * session + n for n in range(64)]
        home = pool.send(request(1100, keys, ttft_s=5.0), now_s=float(number))
        pool.index.apply(home, added=keys, removed=())
        for name in EIGHT:
            pool.table.on_load(name, IDLE, now_s=float(number))
            pool.table.on_load(name, IDLE, now_s=float(number))
        homes.setdefault(session, set()).add(home)
    assert {len(names) for names in homes.values()} == {1}


def test_slo_session_goes_where_it_went_before_where_nothing_speaks_against_it() -> None:
    pool = Pool({name: load() for name in "abcd"}, seed=1)
    first = pool.pick(request(640, session="s")).replica_id
    pool.router.take()
    again = [pool.pick(request(640, session="s")).replica_id for _ in range(8)]
    assert set(again) == {first}


def test_slo_session_does_not_wait_behind_a_queue_for_its_replica() -> None:
    pool = Pool({name: load() for name in "ab"}, seed=1)
    first = pool.pick(request(640, session="s")).replica_id
    pool.router.take()
    busy = load(work_s=5.0, due_s=0.5)
    pool.table.on_load(first, busy, now_s=0.0)
    assert pool.pick(request(640, session="s")).replica_id != first
