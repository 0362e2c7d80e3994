from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from cluster.config import AutoscalingConfig
from cluster.simulator.arrival import Arrival
from cluster.simulator.record import End, SimulationResult
from cluster.simulator.settings import Fault
from cluster.simulator.simulator import simulate
from cluster.simulator.synthetic import from_spec
from cluster.simulator.workload import SloRule, Workload, with_slo
from cluster.types import ServiceClass
from tests.simulator.simulated_clusters import (
    DELAY_S,
    IN_TURN,
    PREFILL_S,
    STEP_S,
    arrival,
    by_id,
    settings,
    simulated,
    spread,
)

BUSY = from_spec("sessions:turns=3,rate=10,duration=10,think=1,system=300,user=500,output=10")
SCALING = AutoscalingConfig(
    min_replicas=1,
    max_replicas=3,
    target_load=4,
    upscale_delay_s=1,
    downscale_delay_s=3,
    metrics_interval_s=0.5,
)


def _hit_rate(result: SimulationResult) -> float:
    hits = sum(replica.num_prefix_hit_tokens for replica in result.replicas)
    return hits / sum(replica.num_prefix_query_tokens for replica in result.replicas)


def _grouped(num_requests: int, *, rate_per_s: float, num_groups: int) -> list[Arrival]:
    """Return requests of one size in groups, each with a prefix of its own."""
    rng, at_s, made = Random(5), 0.0, []
    for index in range(num_requests):
        at_s += rng.expovariate(rate_per_s)
        prefix = (10**6 + rng.randrange(num_groups), 480)
        made.append(arrival(index, at_s, runs=(prefix, (index, 320)), num_output_tokens=3))
    return made


def test_simulation_of_one_seed_is_one() -> None:
    of = settings(num_replicas=3, num_gateways=2, jitter=0.1, seed=4, faults=(Fault(1, 5.0, 2.0),))
    once, again = simulated(BUSY, of), simulated(BUSY, of)
    assert once.requests == again.requests
    assert once.replicas == again.replicas
    assert once.load_over_time == again.load_over_time
    other = simulated(BUSY, replace(of, seed=5))
    assert once.requests != other.requests


def test_simulation_looks_at_no_clock_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> float:
        raise AssertionError("a real clock was used")

    with monkeypatch.context() as patch:
        for name in ("sleep", "monotonic", "time"):
            patch.setattr(time, name, forbidden)
        result = simulated([arrival(), arrival(1, 5000.0)], settings())
    assert result.duration_s > 5000


def test_simulation_of_a_request_alone_is_what_the_cost_model_says() -> None:
    of = settings()
    with_overhead = replace(of, cost=replace(of.cost, overhead_s=0.004))
    for one, overhead_s in ((of, 0.0), (with_overhead, 0.004)):
        (record,) = simulated([arrival(0, 1.0, num_output_tokens=20)], one).requests
        assert record.ttft_s == pytest.approx(DELAY_S + PREFILL_S + overhead_s + DELAY_S)
        assert record.tpot_s == pytest.approx(STEP_S + overhead_s)
        assert record.num_output_tokens == 20
        assert record.end is End.FINISHED


def test_simulation_finds_a_turn_and_its_answer_in_the_cache() -> None:
    before = arrival(0, num_output_tokens=40)
    told = (*before.runs, (before.answer_token, 40))
    work = [before, arrival(1, 1.0, runs=(*told, (99, 50)), follows="r0")]
    record = by_id(simulated(work, settings()))["r1"]
    # Of the answer's last token there is no key and no value: it was never read.
    assert record.num_cached_tokens == record.num_predicted_cached_tokens == 1139 // 16 * 16
    assert record.ttft_s == pytest.approx(2 * DELAY_S + STEP_S)


def test_simulation_lets_followers_come_after_the_one_before() -> None:
    requests = by_id(simulated(BUSY, settings("cache.num_blocks=2000", num_replicas=2)))
    num_followers = 0
    for record in requests.values():
        if record.arrival.follows:
            before = requests[record.arrival.follows]
            assert before.last_token_s is not None
            assert record.arrived_s == before.last_token_s + record.arrival.arrived_s
            num_followers += 1
    assert num_followers > 100


def test_simulation_lets_followers_come_whatever_the_end_was() -> None:
    late = arrival(0, runs=((1, 7000),))  # the engine refuses it
    requests = by_id(simulated([late, arrival(1, 2.0, follows="r0")], settings(*IN_TURN)))
    assert requests["r0"].end is End.FAILED
    assert requests["r1"].end is End.FINISHED
    assert requests["r1"].arrived_s == pytest.approx(2.0 + 3 * DELAY_S)


def test_simulation_cuts_what_has_not_ended() -> None:
    work = [arrival(0), arrival(1, 2.9, num_output_tokens=50), arrival(2, 3.5)]
    result = simulated(work, settings(max_duration_s=3.2))
    assert [record.end for record in result.requests] == [End.FINISHED, End.CUT, End.CUT]
    assert 0 < result.requests[1].num_output_tokens < 50
    assert result.duration_s <= 3.2


def test_simulation_ends_every_request_once_whatever_happens() -> None:
    work = with_slo(BUSY, SloRule(0.3, 0.0, 0.05))
    hurried = [
        replace(a, service_class=ServiceClass.INTERACTIVE, deadline_s=0.5) if i % 3 == 0 else a
        for i, a in enumerate(work.arrivals)
    ]
    faults = (Fault(0, 2.0, 1.0), Fault(1, 4.0, 1.0, slowness=20.0), Fault(2, 6.0))
    of = settings("cache.num_blocks=150", num_replicas=3, num_gateways=2, faults=faults)
    result = simulated(Workload.in_order("hard", hurried), of)
    assert len(result.requests) == len(work.arrivals)
    ends = Counter(record.end for record in result.requests)
    assert ends[End.CUT] == 0
    assert min(ends[end] for end in (End.FINISHED, End.REFUSED, End.FAILED)) > 0


def test_simulation_tells_how_far_it_is() -> None:
    told: list[float] = []
    work = Workload.in_order("long", [arrival(0, num_output_tokens=6000)])
    of = settings("cache.num_blocks=1000", max_output_tokens=8000)
    simulate(work, of, told.append)
    assert all(before < after for before, after in pairwise(told))
    assert told


def test_replica_that_dies_ends_and_is_replaced() -> None:
    work = [arrival(0, 0.1), arrival(1, 0.1), arrival(2, 3.0)]
    faults = (Fault(0, 0.3, duration_s=2.0),)
    result = simulated(work, settings(*IN_TURN, num_replicas=2, faults=faults))
    lives = [(r.replica_id, r.started_s, r.ended_s) for r in result.replicas]
    assert lives == [
        ("replica-0000", 0.0, 0.3),
        ("replica-0001", 0.0, None),
        ("replica-0002", 2.3, None),
    ]
    assert result.num_replicas_over_time[1:] == [(0.0, 2), (0.3, 1), (2.3, 2)]
    assert by_id(result)["r2"].replica_id == "replica-0002"


def test_replica_that_dies_loses_only_what_has_begun_to_answer() -> None:
    # Pairs of which one goes to each replica: answers under way, and prompts half computed.
    answers = [arrival(i, 0.1, num_output_tokens=60) for i in range(2)]
    prompts = [arrival(2 + i, 0.22, runs=((50 + i, 2000),)) for i in range(2)]
    of = settings(*IN_TURN, num_replicas=2, faults=(Fault(0, 0.3),))
    requests = by_id(simulated(answers + prompts, of))
    assert [requests[f"r{i}"].end for i in range(4)] == [
        End.FAILED,
        End.FINISHED,
        End.FINISHED,
        End.FINISHED,
    ]
    assert requests["r2"].replica_id == "replica-0001"


def test_replica_that_is_slow_gets_less_work() -> None:
    work = _grouped(300, rate_per_s=30, num_groups=300)
    slow = simulated(work, settings(num_replicas=2, replica_slowness=(3.0,)))
    even = simulated(work, settings(num_replicas=2))
    first, second = (replica.num_requests for replica in slow.replicas)
    assert first < 0.6 * second
    assert spread(replica.num_requests for replica in even.replicas) < 1.2


def test_replica_that_is_slow_for_a_while_recovers() -> None:
    work = [arrival(i, 1.0 + 2.0 * i) for i in range(3)]
    faults = (Fault(0, 2.5, duration_s=2.0, slowness=5.0),)
    ttfts_s = [record.ttft_s for record in simulated(work, settings(faults=faults)).requests]
    usual_s, slow_s = 2 * DELAY_S + PREFILL_S, 2 * DELAY_S + 5 * PREFILL_S
    assert ttfts_s == pytest.approx([usual_s, slow_s, usual_s])


def test_autoscaling_follows_the_load_up_and_down() -> None:
    crowd = [arrival(i, 0.05 * i) for i in range(100)]
    later = [arrival(100 + i, 10.0 + 1.0 * i) for i in range(15)]
    result = simulated(crowd + later, settings(autoscaling=SCALING, start_s=2.0))
    assert {record.end for record in result.requests} == {End.FINISHED}
    sizes = [size for _, size in result.num_replicas_over_time]
    assert (sizes[0], max(sizes), sizes[-1]) == (1, 3, 1)
    grown_s = next(at_s for at_s, size in result.num_replicas_over_time if size > 1)
    assert grown_s >= SCALING.upscale_delay_s + 2.0
    assert sizes == sorted(sizes[: sizes.index(3) + 1]) + sorted(
        sizes[sizes.index(3) + 1 :], reverse=True
    )
    ended = [replica for replica in result.replicas if replica.ended_s is not None]
    assert len(ended) == 2


def test_autoscaling_waits_for_new_replicas_as_long_as_they_need() -> None:
    crowd = [arrival(i, 0.05 * i) for i in range(100)]

    def grown_s(start_s: float) -> float:
        result = simulated(crowd, settings(autoscaling=SCALING, start_s=start_s))
        return next(at_s for at_s, size in result.num_replicas_over_time if size > 1)

    assert grown_s(4.0) - grown_s(1.0) == pytest.approx(3.0)


def test_four_gateways_do_as_well_as_one() -> None:
    work = _grouped(500, rate_per_s=90, num_groups=8)
    one, four = (
        simulated(work, settings("cache.num_blocks=2000", num_replicas=4, num_gateways=gateways))
        for gateways in (1, 4)
    )
    assert Counter(record.gateway for record in four.requests) == dict.fromkeys(range(4), 125)
    assert _hit_rate(four) == pytest.approx(_hit_rate(one), abs=0.01)
    spreads = [spread(r.num_requests for r in result.replicas) for result in (one, four)]
    assert spreads[1] <= 1.05 * spreads[0]


def test_hot_prefix_is_served_by_all_replicas() -> None:
    # Twice what one replica computes of the tails, were the prefix always cached.
    work = from_spec("hot_prefix:prefix=1000,rate=50,duration=8,tail=400,output=5")
    result = simulated(work, settings(num_replicas=4))
    assert spread(replica.busy_s for replica in result.replicas) <= 1.3
    assert _hit_rate(result) > 0.5


def test_batch_work_keeps_its_weight_under_overload() -> None:
    text = "overload_classes:capacity=10000,input=500,output=2,duration=40,backlog=50"
    work = with_slo(
        from_spec(text), SloRule(1.0, 0.0, None), {ServiceClass.BATCH: SloRule(None, 0.0, None)}
    )
    of = settings("cache.num_blocks=4000", "engine.fair_burst_tokens=1024")
    result = simulated(work, of)
    tokens = Counter[ServiceClass]()
    for record in result.requests:
        if record.first_token_s is not None and 10 <= record.first_token_s < 40:
            tokens[record.arrival.service_class] += record.arrival.num_prompt_tokens
    engine = of.config.engine
    weight = engine.batch.weight / (engine.batch.weight + engine.interactive.weight)
    assert tokens[ServiceClass.BATCH] >= 0.9 * weight * tokens.total()
    assert tokens.total() >= 0.95 * 30 * 10_000  # nothing lies idle
    assert {r.end for r in result.requests} == {End.FINISHED, End.REFUSED}
