"""One gateway's decisions: dispatched, degraded, queued, refused, expired, and what is learnt."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from route_fakes import IDLE, info, load, request

from cluster.config import ClusterConfig
from cluster.router.dispatcher import MAX_HOLD_S, MIN_RETRY_S, Dispatcher
from cluster.router.route import OutcomeKind
from cluster.types import NO_SLO, SLO, ReplicaLoad, ServiceClass

FULL = load(num_free_blocks=0, num_waiting=1)
BUSY = load(work_s=10.0, due_s=0.1)  # ten seconds that come first


def dispatcher(
    *, on_miss: str = "refuse", seed: int = 0, router: dict[str, Any] | None = None, **gateway: int
) -> Dispatcher:
    tree = {
        "router": router or {},
        "gateway": gateway,
        "engine": {"standard": {"on_miss": on_miss, "ttft_s": 5.0}},
    }
    return Dispatcher(ClusterConfig.model_validate(tree), rng=random.Random(seed))


def connect(target: Dispatcher, replica_id: str, its_load: ReplicaLoad = IDLE) -> None:
    target.index.replace(replica_id, [])
    target.table.add(info(replica_id), its_load, now_s=0.0)


def with_replicas(loads: dict[str, ReplicaLoad], **kwargs: Any) -> Dispatcher:
    target = dispatcher(**kwargs)
    for replica_id, its_load in loads.items():
        connect(target, replica_id, its_load)
    return target


def counts(target: Dispatcher) -> dict[str, float]:
    names = ("num_sent", "sent_tokens", "sent_blocks", "sent_s", "num_open")
    return {name: float(target.table.column(name).sum()) for name in names}


def test_dispatched_request_counts_as_sent() -> None:
    target = with_replicas({"a": IDLE})
    route = request(160, ttft_s=1.0)
    outcome = target.submit(route, 0.0)
    assert (outcome.kind, outcome.slo, outcome.is_dispatched) == ("dispatched", route.slo, True)
    assert outcome.decision is not None and outcome.decision.replica_id == "a"
    assert counts(target)["num_sent"] == 1 and counts(target)["sent_tokens"] == 160
    assert target.table.work_before(1.0, 0.0).tolist() == pytest.approx([0.16])
    target.on_end(route.request_id)
    assert not any(counts(target).values())


def test_policy_learns_where_requests_went_and_only_those() -> None:
    target = with_replicas({"a": IDLE, "b": IDLE}, router={"policy": "round_robin"})
    routes = [request(), request(expires_s=0.01), request(), request()]
    outcomes = [target.submit(route, 0.0) for route in routes]
    decisions = [outcome.decision for outcome in outcomes]
    assert outcomes[1].kind is OutcomeKind.REFUSED
    assert [decision and decision.replica_id for decision in decisions] == ["a", "b", "b", "a"]


def test_objective_that_cannot_be_kept_is_refused_with_figures() -> None:
    target = with_replicas({"a": BUSY})
    outcome = target.submit(request(1000, ttft_s=2.0, arrived_s=0.0), 0.5)
    assert (outcome.kind, outcome.slo, outcome.is_dispatched) == ("refused", NO_SLO, False)
    assert outcome.reason.startswith("ttft_s=2 cannot be kept")
    assert "need 10.5 s to the first token" in outcome.reason
    assert outcome.reason.endswith("try again later, or allow more time")
    assert outcome.retry_after_s == pytest.approx(0.5 + 10.51 - 2.0, abs=0.1)
    assert not any(counts(target).values()) and not target.num_queued


def test_tpot_that_cannot_be_kept_is_refused_by_its_name() -> None:
    target = with_replicas({"a": IDLE})
    outcome = target.submit(request(100, ttft_s=5.0, tpot_s=0.001), 0.0)
    assert outcome.kind is OutcomeKind.REFUSED
    assert outcome.reason.startswith("tpot_s=0.001 cannot be kept")
    assert outcome.retry_after_s == MIN_RETRY_S


def test_class_that_degrades_is_served_without_its_objective() -> None:
    target = with_replicas({"a": BUSY}, on_miss="degrade")
    outcome = target.submit(request(1000, ttft_s=2.0), 0.0)
    assert (outcome.kind, outcome.slo, outcome.is_dispatched) == ("degraded", NO_SLO, True)
    assert outcome.reason == "ttft_s=2 cannot be kept: served without it"
    assert target.table.work_before(2.0, 0.0).tolist() == [10.0]  # it stands in nobody's way
    assert target.table.work_before(math.inf, 0.0).tolist() == [11.0]


def test_class_that_queues_is_served_all_the_same() -> None:
    target = with_replicas({"a": BUSY}, on_miss="queue")
    outcome = target.submit(request(1000, ttft_s=2.0), 0.0)
    assert (outcome.kind, outcome.slo) == ("dispatched", SLO(2.0))


@pytest.mark.parametrize("on_miss", ["refuse", "degrade", "queue"])
def test_deadline_that_cannot_be_met_is_refused_whatever_the_class(on_miss: str) -> None:
    target = with_replicas({"a": BUSY}, on_miss=on_miss)
    outcome = target.submit(request(1000, expires_s=3.0), 1.0)
    assert outcome.kind is OutcomeKind.REFUSED
    assert outcome.reason.startswith("its deadline is over in 2 s, ")
    assert target.submit(request(1000, expires_s=30.0), 1.0).is_dispatched


def test_each_class_has_its_own_answer_to_a_miss() -> None:
    tree = {"engine": {c: {"on_miss": m} for c, m in _BY_CLASS.items()}}
    target = Dispatcher(ClusterConfig.model_validate(tree), rng=random.Random(0))
    connect(target, "a", BUSY)
    kinds = {
        name: target.submit(request(ttft_s=1.0, service_class=ServiceClass(name)), 0.0).kind
        for name in _BY_CLASS
    }
    assert kinds == {"interactive": "degraded", "standard": "refused", "batch": "dispatched"}


_BY_CLASS = {"interactive": "degrade", "standard": "refuse", "batch": "queue"}


def test_without_admission_everything_is_dispatched() -> None:
    target = with_replicas({"a": BUSY}, router={"admission": "off"})
    for route in (request(1000, ttft_s=0.1), request(1000, expires_s=0.1), request(tpot_s=1e-9)):
        assert target.submit(route, 0.0).kind is OutcomeKind.DISPATCHED


def test_request_waits_where_no_replica_is_ready_and_goes_when_one_comes() -> None:
    target = dispatcher()
    first, second = request(100), request(50)
    outcome = target.submit(first, 0.0)
    assert (outcome.kind, outcome.reason, outcome.position) == ("queued", "no replica is ready", 0)
    assert outcome.estimate_s is None
    assert target.submit(second, 1.0).position == 1
    assert (target.num_queued, target.num_queued_tokens) == (2, 150)
    assert target.poll(1.5) == []
    connect(target, "a")
    left = target.poll(2.0)
    assert [(route, outcome.kind) for route, outcome in left] == [
        (first, "dispatched"),
        (second, "dispatched"),
    ]
    assert (target.num_queued, target.num_queued_tokens) == (0, 0)
    assert counts(target)["num_sent"] == 2


def test_request_waits_where_replicas_are_full_and_those_after_it_too() -> None:
    target = with_replicas({"a": FULL})
    assert target.submit(request(160), 0.0).reason == "no replica has room"
    target.table.on_load("a", IDLE, now_s=0.1)
    assert target.submit(request(16), 0.1).position == 1  # nobody overtakes
    assert len(target.poll(0.2)) == 2
    assert target.submit(request(16), 0.3).is_dispatched


def test_place_follows_those_before_it() -> None:
    target = dispatcher()
    routes = [request(100) for _ in range(3)]
    for route in routes:
        target.submit(route, 0.0)
    target.on_end(routes[0].request_id)
    place = target.place(routes[2].request_id, 0.0)
    assert place is not None and (place.kind, place.position) == ("queued", 1)


def test_place_of_what_does_not_wait_is_none() -> None:
    target = with_replicas({"a": IDLE})
    assert target.place("unknown", 0.0) is None
    route = request()
    target.submit(route, 0.0)
    assert target.place(route.request_id, 0.0) is None


def test_estimate_follows_how_fast_requests_leave() -> None:
    target = dispatcher()
    for _ in range(10):
        target.submit(request(160), 0.0)
    connect(target, "a", FULL)
    for tick in range(1, 6):
        target.table.on_load("a", load(num_free_blocks=12), now_s=0.2 * tick)
        target.table.on_load("a", load(num_free_blocks=12), now_s=0.2 * tick)
        assert len(target.poll(0.2 * tick)) == 1
    outcome = target.submit(request(160), 1.1)
    assert outcome.position == 5
    assert outcome.estimate_s == pytest.approx(6 * 0.9 / 5)  # five have left since 0.2


def test_estimate_does_not_count_the_time_in_which_nobody_waited() -> None:
    target = with_replicas({"a": FULL}, max_queued_requests=2)
    for start_s in (0.0, 3600.0):
        target.table.on_load("a", FULL, now_s=start_s)
        for _ in range(2):
            assert target.submit(request(arrived_s=start_s), start_s).kind == "queued"
        if start_s:
            break
        target.table.on_load("a", IDLE, now_s=1.0)
        assert len(target.poll(1.0)) == 2
    target.table.on_load("a", load(num_free_blocks=12), now_s=3600.5)
    target.table.on_load("a", load(num_free_blocks=12), now_s=3600.5)
    assert len(target.poll(3600.5)) == 1
    place = target.submit(request(arrived_s=3600.5), 3600.5)
    assert place.estimate_s is None or place.estimate_s < 10.0
    refused = target.submit(request(arrived_s=3600.5), 3600.5)
    assert refused.kind is OutcomeKind.REFUSED and 0.1 <= refused.retry_after_s < 10.0


def test_queue_that_is_full_refuses() -> None:
    target = dispatcher(max_queued_requests=1)
    target.submit(request(), 0.0)
    outcome = target.submit(request(), 0.0)
    assert (outcome.kind, outcome.decision) == ("refused", None)
    assert "gateway.max_queued_requests=1: try again later" in outcome.reason
    assert outcome.retry_after_s > 0
    few_tokens = dispatcher(max_queued_tokens=100)
    assert few_tokens.submit(request(100), 0.0).kind is OutcomeKind.QUEUED
    assert "gateway.max_queued_tokens=100" in few_tokens.submit(request(1), 0.0).reason


def test_queued_request_expires_with_its_deadline_or_the_queue_s_time() -> None:
    target = dispatcher(queue_timeout_s=30)
    mortal, patient = request(expires_s=5.0), request()
    target.submit(mortal, 0.0)
    target.submit(patient, 0.0)
    assert target.next_poll_s() == 5.0
    assert target.poll(4.9) == []
    ((route, outcome),) = target.poll(5.1)
    assert (route, outcome.kind) == (mortal, OutcomeKind.EXPIRED)
    assert outcome.reason == "the deadline passed while it waited for a replica: try again later"
    assert target.next_poll_s() == 30.0
    ((route, outcome),) = target.poll(30.1)
    assert route is patient and "gateway.queue_timeout_s=30" in outcome.reason
    assert target.next_poll_s() == math.inf and not target.num_queued


def test_queued_request_whose_objective_is_over_is_served_without_it() -> None:
    target = dispatcher(on_miss="refuse")
    target.submit(request(100, ttft_s=1.0), 0.0)
    connect(target, "a")
    ((_, outcome),) = target.poll(3.0)
    assert outcome.kind is OutcomeKind.DEGRADED
    assert outcome.slo.ttft_s is None


def test_full_replicas_hold_one_class_and_not_the_others() -> None:
    target = with_replicas({"a": load(num_free_blocks=12, num_waiting=1)})
    large = request(1600, service_class=ServiceClass.BATCH)
    assert target.submit(large, 0.0).kind is OutcomeKind.QUEUED
    assert target.submit(request(100), 0.0).is_dispatched
    assert target.submit(request(100, service_class=ServiceClass.BATCH), 0.0).kind == "queued"


def test_full_replica_gets_what_has_waited_long_enough() -> None:
    target = with_replicas({"a": load(num_free_blocks=12, num_waiting=1)})
    target.submit(request(1600), 0.0)
    assert target.poll(MAX_HOLD_S - 0.1) == []
    ((_, outcome),) = target.poll(MAX_HOLD_S)
    assert outcome.is_dispatched


def test_flood_of_one_tenant_leaves_the_full_queue_for_another() -> None:
    target = dispatcher(max_queued_requests=4)
    flood = [request(9000, tenant="flood") for _ in range(4)]
    for route in flood:
        assert target.submit(route, 0.0).kind is OutcomeKind.QUEUED
    assert target.submit(request(9000, tenant="flood"), 0.0).kind is OutcomeKind.REFUSED
    assert target.submit(request(9000, tenant="other"), 0.0).kind is OutcomeKind.QUEUED
    assert target.next_poll_s() < 0.0
    ((pushed_out, outcome),) = target.poll(0.1)
    assert pushed_out is flood[-1] and outcome.kind is OutcomeKind.REFUSED
    assert target.num_queued == 4


def test_turns_in_the_queue_are_those_of_its_order() -> None:
    target = dispatcher()
    loose = request(ttft_s=9.0, tenant="a")
    tight = request(ttft_s=4.0, tenant="a")
    for route in (loose, tight):
        target.submit(route, 0.0)
    connect(target, "a")
    assert [route for route, _ in target.poll(0.1)] == [tight, loose]


def test_request_does_not_go_where_it_has_failed() -> None:
    target = with_replicas({"a": IDLE, "b": IDLE})
    for failed, other in (("a", "b"), ("b", "a")):
        outcome = target.submit(request(160, excluded=(failed,)), 0.0)
        assert outcome.decision is not None and outcome.decision.replica_id == other
    assert not target.can_place(request(160, excluded=("a", "b")))


def test_request_that_ends_leaves_nothing_wherever_its_replica_is() -> None:
    target = with_replicas({"a": IDLE})
    route = request(ttft_s=1.0)
    target.submit(route, 0.0)
    target.table.remove("a")
    target.on_first_token(route.request_id, 0.5)
    target.on_end(route.request_id)
    target.on_end(route.request_id)
    connect(target, "a")
    assert not any(counts(target).values())


def test_prediction_errors_are_taken_once() -> None:
    target = with_replicas({"a": IDLE})
    route = request(100)
    target.submit(route, 0.0)
    target.on_first_token(route.request_id, 0.22)
    target.on_first_token(route.request_id, 9.0)
    assert list(target.take_prediction_errors()) == pytest.approx([2.0])
    assert list(target.take_prediction_errors()) == []


def test_first_tokens_teach_the_replica_s_median() -> None:
    target = with_replicas({"a": IDLE})
    for _ in range(20):
        route = request(980)
        target.submit(route, 0.0)
        target.on_first_token(route.request_id, 3.0)
        target.on_end(route.request_id)
    assert target.table.column("median").tolist() == pytest.approx([3.0], rel=0.05)


def test_first_token_that_comes_too_late_counts_as_a_miss_once() -> None:
    """Whether or not something else has arrived in between."""
    levels = []
    for is_quiet in (True, False):
        target = with_replicas({"a": IDLE})
        before = target.table.risk.level
        route = request(100, ttft_s=1.0)
        target.submit(route, 0.0)
        if not is_quiet:
            other = request(100)
            target.submit(other, 1.5)
        target.on_first_token(route.request_id, 2.0)
        levels.append(target.table.risk.level - before)
    assert levels[0] > 0.04
    assert levels[0] == pytest.approx(levels[1])


def test_request_without_an_objective_teaches_no_risk() -> None:
    target = with_replicas({"a": IDLE})
    target.table.risk.level = 0.7
    route = request(100, service_class=ServiceClass.BATCH)
    target.submit(route, 0.0)
    target.on_first_token(route.request_id, 50.0)
    assert target.table.risk.level == 0.7
    assert target.table.column("median").tolist() == [1.0]


def test_deadline_that_is_just_met_or_just_missed_has_an_answer() -> None:
    rng, target = random.Random(0), with_replicas({"a": IDLE})
    for _ in range(500):
        now_s = rng.uniform(1e3, 1e6)
        target.table.on_load("a", IDLE, now_s=now_s)
        route = request(160, arrived_s=now_s, expires_s=now_s + 0.17)  # what it takes
        outcome = target.submit(route, now_s)
        assert outcome.is_dispatched or outcome.reason.startswith("its deadline is over in 0.17 s")
        target.on_end(route.request_id)


def test_request_that_ended_early_is_no_miss() -> None:
    target = with_replicas({"a": IDLE})
    before = target.table.risk.level
    route = request(100, ttft_s=1.0)
    target.submit(route, 0.0)
    target.on_end(route.request_id)
    target.submit(request(100), 5.0)
    assert target.table.risk.level <= before


def test_what_is_remembered_of_due_times_is_bounded_by_what_is_under_way() -> None:
    target = with_replicas({"a": IDLE})
    late = request(1, ttft_s=20.0)
    target.submit(late, 0.0)
    for number in range(2000):
        route = request(1, ttft_s=1e9)
        target.submit(route, 0.001 * number)
        target.on_end(route.request_id)
    assert len(target._dues) < 200
    level = target.table.risk.level
    target.on_first_token(late.request_id, 21.0)
    assert target.table.risk.level > level  # it is not forgotten that it was due


def test_polls_of_a_waiting_request_do_not_make_its_prefix_hot() -> None:
    target = with_replicas({"a": FULL})
    target.index.apply("a", added=[1, 2, 3], removed=())
    target.submit(request(160, [1, 2, 3]), 0.0)
    for tick in range(50):
        target.poll(0.01 * tick)
    hot = target._router._policy._hot  # type: ignore[attr-defined]
    assert sum(uses for uses, _ in hot._uses.values()) <= 2.0


def test_explain_keeps_the_newest_decisions_with_what_became_of_them() -> None:
    target = with_replicas({"a": IDLE}, router={"max_decisions": 3})
    routes = [request(100, arrived_s=0.0) for _ in range(5)]
    for route in routes:
        target.submit(route, 1.0)
        target.on_first_token(route.request_id, 1.5)
        target.on_end(route.request_id)
    known = [target.explain(route.request_id) for route in routes]
    assert [explanation is not None for explanation in known] == [False, False, True, True, True]
    assert known[4] is not None
    assert known[4].request.request_id == routes[4].request_id
    assert known[4].outcome.kind is OutcomeKind.DISPATCHED
    assert (known[4].decided_s, known[4].ttft_s) == (1.0, 1.5)


def test_explain_tells_of_queued_and_refused_requests_too() -> None:
    target = dispatcher()
    route = request(100, ttft_s=1.0)
    target.submit(route, 0.0)
    explanation = target.explain(route.request_id)
    assert explanation is not None and explanation.outcome.kind is OutcomeKind.QUEUED
    connect(target, "a", BUSY)
    target.poll(0.5)
    explanation = target.explain(route.request_id)
    assert explanation is not None and explanation.outcome.kind is OutcomeKind.REFUSED


def test_queued_request_that_no_replica_serves_does_not_hold_up_others() -> None:
    target = with_replicas({"a": IDLE})
    target.submit(request(model="other"), 0.0)
    outcome = target.submit(request(model="m"), 0.0)
    served = [route.model for route, _ in target.poll(0.1)]
    assert outcome.is_dispatched or served == ["m"]
