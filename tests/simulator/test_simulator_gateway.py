from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.simulator.record import End
from cluster.simulator.settings import Fault
from cluster.types import SLO, ServiceClass
from tests.simulator.simulated_clusters import (
    DELAY_S,
    IN_TURN,
    PREFILL_S,
    arrival,
    by_id,
    settings,
    simulated,
)

ALIKE = ((7, 1100),)
LONG = ((9, 5000),)  # half a second of prefill


def test_gateway_decides_on_what_has_reached_it() -> None:
    # The first one's blocks are made at 4.11, and known a second later.
    times_s = (3.0, 5.1, 5.2)
    work = [arrival(i, at_s, runs=ALIKE) for i, at_s in enumerate(times_s)]
    requests = by_id(simulated(work, settings(event_delay_s=1.0)))
    assert [requests[f"r{i}"].num_predicted_cached_tokens for i in range(3)] == [0, 0, 1088]
    assert [requests[f"r{i}"].num_cached_tokens for i in range(3)] == [0, 1088, 1088]


def test_gateway_holds_requests_until_a_replica_is_known() -> None:
    (record,) = simulated([arrival()], settings(event_delay_s=1.0)).requests
    assert record.dispatched_s == 1.0
    assert record.first_token_s == pytest.approx(3.0 + PREFILL_S)


def test_gateway_asks_another_replica_when_one_dies() -> None:
    work = [arrival(0, 0.1, runs=LONG), arrival(1, 0.12)]
    of = settings(*IN_TURN, num_replicas=3, faults=(Fault(0, 0.2),))
    requests = by_id(simulated(work, of))
    assert requests["r1"].replica_id == "replica-0001"
    record = requests["r0"]
    assert (record.end, record.replica_id) == (End.FINISHED, "replica-0002")
    assert record.dispatched_s == 0.2 + DELAY_S
    assert record.num_output_tokens == 5


def test_gateway_does_not_ask_the_replica_again_that_has_gone() -> None:
    # Half a second on its way; that the replica has died at 5.3 is known at 5.8.
    work = [arrival(0, 2.0, runs=ALIKE), arrival(1, 5.0, runs=ALIKE)]
    of = settings(num_replicas=2, event_delay_s=0.5)
    chosen = by_id(simulated(work, of))["r1"]
    assert chosen.num_predicted_cached_tokens == 1088
    faults = (Fault(int(chosen.replica_id[-1]), 5.3),)
    record = by_id(simulated(work, replace(of, faults=faults)))["r1"]
    assert record.end is End.FINISHED
    assert record.replica_id != chosen.replica_id
    assert record.dispatched_s == 5.5


def test_gateway_fails_a_request_where_there_is_no_other_replica() -> None:
    of = settings(faults=(Fault(0, 0.15, 1.0),))
    (record,) = simulated([arrival(0, 0.1)], of).requests
    assert (record.end, record.reason) == (End.FAILED, "its replica died")


def test_gateway_asks_one_other_replica_though_the_first_may_still_get_the_request() -> None:
    # Replica 0 is dead from 5.0 on, which is known at 5.5; the request is then on its way to it.
    of = settings(*IN_TURN, num_replicas=2, faults=(Fault(0, 5.0),), event_delay_s=0.5)
    result = simulated([arrival(0, 5.2)], of)
    (record,) = result.requests
    assert (record.end, record.replica_id) == (End.FINISHED, "replica-0001")
    assert record.dispatched_s == 5.5
    assert [replica.num_requests for replica in result.replicas] == [0, 1]


def test_gateway_asks_at_most_two_replicas() -> None:
    faults = (Fault(0, 0.2), Fault(1, 0.3))
    of = settings(*IN_TURN, num_replicas=3, faults=faults)
    (record,) = simulated([arrival(0, 0.1, runs=LONG)], of).requests
    assert (record.end, record.reason) == (End.FAILED, "its replica died")
    assert record.replica_id == "replica-0001"


def test_gateway_ends_a_request_whose_answer_was_seen_when_its_replica_dies() -> None:
    of = settings(*IN_TURN, num_replicas=2, faults=(Fault(0, 0.3),))
    (record,) = simulated([arrival(0, 0.1, num_output_tokens=50)], of).requests
    assert (record.end, record.replica_id) == (End.FAILED, "replica-0000")
    assert 0 < record.num_output_tokens < 50


def test_gateway_asks_another_replica_where_one_is_full() -> None:
    # Three gateways begin with the same one: a step, a place in its queue, and one too many.
    of = settings(*IN_TURN, "engine.max_num_waiting=1", num_replicas=2, num_gateways=3)
    result = simulated([arrival(i, 0.1) for i in range(3)], of)
    assert {record.end for record in result.requests} == {End.FINISHED}
    replicas = [record.replica_id for record in result.requests]
    assert replicas == ["replica-0000", "replica-0000", "replica-0001"]
    assert [replica.num_requests for replica in result.replicas] == [3, 1]


def test_gateway_does_not_ask_again_what_no_replica_can_serve() -> None:
    result = simulated([arrival(0, 0.1, runs=((9, 7000),))], settings(*IN_TURN, num_replicas=2))
    (record,) = result.requests
    assert record.end is End.FAILED
    assert record.reason.startswith("INVALID_ARGUMENT")
    assert sum(replica.num_requests for replica in result.replicas) == 1


def test_gateway_refuses_what_cannot_be_in_time() -> None:
    hurried = arrival(0, 0.1, slo=SLO(0.05), service_class=ServiceClass.INTERACTIVE)
    result = simulated([hurried], settings())
    (record,) = result.requests
    assert record.end is End.REFUSED
    assert "try again later" in record.reason
    assert record.dispatched_s is None and not record.replica_id
    assert result.replicas[0].num_requests == 0


def test_gateway_lets_requests_expire_that_no_replica_takes() -> None:
    of = settings("gateway.queue_timeout_s=2", faults=(Fault(0, 0.5),))
    result = simulated([arrival(0, 1.0), arrival(1, 1.2, deadline_s=0.7)], of)
    assert [record.end for record in result.requests] == [End.EXPIRED, End.EXPIRED]
    assert "queue_timeout_s=2" in result.requests[0].reason
    assert "deadline" in result.requests[1].reason
    assert result.duration_s == 3.0  # when the time in the queue was over


def test_gateway_tells_replicas_the_deadline() -> None:
    work = [arrival(0, 0.1, runs=LONG), arrival(1, 0.11, deadline_s=0.15)]
    of = settings("router.admission='off'", "engine.order=fcfs")
    record = by_id(simulated(work, of))["r1"]
    assert record.end is End.EXPIRED
    assert record.reason.startswith("DEADLINE_EXCEEDED")
    assert record.num_output_tokens == 0


@pytest.mark.parametrize("num_blocks", [150, 4000])
def test_gateway_and_engine_serve_tenants_by_their_weights(num_blocks: int) -> None:
    """With few blocks requests wait at the gateway, with many in the engine."""
    work = [
        arrival(i, 0.01, tenant=tenant, tenant_weight=weight, num_output_tokens=1)
        for i, (tenant, weight) in enumerate([("much", 3.0), ("little", 1.0)] * 40)
    ]
    of = settings(f"cache.num_blocks={num_blocks}", "engine.fair_burst_tokens=512")
    result = simulated(work, of)
    firsts = sorted(result.requests, key=lambda record: record.first_token_s or 0.0)[:40]
    num_much = sum(record.arrival.tenant == "much" for record in firsts)
    assert num_much == pytest.approx(30, abs=2)
