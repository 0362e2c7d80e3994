"""The gateway's queue: whose turn it is, what it refuses, and when a request's time is over."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClusterConfig, EngineConfig, GatewayConfig, LatencyConfig
from cluster.errors import OverloadedError
from cluster.router.route import RouteRequest
from cluster.router.waiting_queue import WaitingQueue
from cluster.types import SLO, ServiceClass

INTERACTIVE, STANDARD, BATCH = ServiceClass
_ids = itertools.count()


def queue(
    *, max_requests: int = 1000, max_tokens: int = 10**9, burst: int = 1000, late: float = 1.0
) -> WaitingQueue:
    gateway = GatewayConfig(max_queued_requests=max_requests, max_queued_tokens=max_tokens)
    engine = EngineConfig(
        interactive=LatencyConfig(weight=8.0),
        standard=LatencyConfig(weight=4.0),
        batch=LatencyConfig(weight=1.0),
        fair_burst_tokens=burst,
        late_weight=late,
    )
    return WaitingQueue(ClusterConfig(gateway=gateway, engine=engine))


def request(
    tenant: str = "",
    *,
    num_tokens: int = 100,
    arrived_s: float = 0.0,
    ttft_s: float | None = None,
    service_class: ServiceClass = STANDARD,
    weight: float = 1.0,
    expires_s: float = math.inf,
) -> RouteRequest:
    return RouteRequest(
        f"{tenant}{next(_ids)}",
        num_tokens,
        lambda fingerprint, block_size: (),
        arrived_s,
        slo=SLO(ttft_s),
        service_class=service_class,
        tenant=tenant,
        tenant_weight=weight,
        expires_s=expires_s,
    )


def serve_for_a_while(
    waiting: WaitingQueue, offer: Callable[[float], list[RouteRequest]], *, num_rounds: int = 400
) -> Counter[tuple[ServiceClass, str]]:
    """Return the tokens served when each round offers more than the 1,000 that it can serve."""
    served: Counter[tuple[ServiceClass, str]] = Counter()
    budget = 0
    for now in range(num_rounds):
        waiting.expired(now)
        for one in offer(float(now)):
            waiting.push(one, until_s=now + 30.0)
        budget += 1000
        for one in waiting.order(now):
            if budget < one.num_prompt_tokens:
                break
            budget -= one.num_prompt_tokens
            waiting.served(one)
            served[one.service_class, one.tenant] += one.num_prompt_tokens
        waiting.check_invariants()
    return served


def test_queue_first_due_is_first_of_a_tenant() -> None:
    waiting = queue()
    loose = request(arrived_s=0.0, ttft_s=9.0)
    endless = request(arrived_s=0.0, ttft_s=1e9)  # as if due 30 s after it came
    none = request(arrived_s=1.0)  # likewise
    tight = request(arrived_s=5.0, ttft_s=1.0)
    for one in (none, endless, loose, tight):
        waiting.push(one, until_s=99.0)
    assert list(waiting.order(0.0)) == [tight, loose, endless, none]


def test_queue_request_without_objective_is_overtaken_for_thirty_seconds_at_most() -> None:
    waiting = queue()
    patient = request(arrived_s=0.0)
    waiting.push(patient, until_s=99.0)
    for arrived_s in range(1, 40):
        waiting.push(request(arrived_s=arrived_s, ttft_s=0.5), until_s=99.0)
    before = list(itertools.takewhile(lambda one: one is not patient, waiting.order(0.0)))
    assert [one.arrived_s for one in before] == list(range(1, 30))
    assert waiting.position(patient.request_id) == 29


def test_queue_flood_of_one_tenant_stops_nobody_else() -> None:
    waiting = queue()
    for _ in range(900):
        waiting.push(request("flood", num_tokens=1000, ttft_s=1.0), until_s=99.0)
    modest = [request("modest", arrived_s=5.0, num_tokens=1000) for _ in range(3)]
    for one in modest:
        waiting.push(one, until_s=99.0)
    places = [waiting.position(one.request_id) for one in modest]
    assert places == [1, 3, 5]  # in turn with the flood, though due later than all of it


def test_queue_tenants_get_their_weights_of_twice_what_can_be_served() -> None:
    weights = {"small": 1.0, "large": 3.0, "light": 3.0}

    def offer(now_s: float) -> list[RouteRequest]:
        return [
            request(tenant, arrived_s=now_s, num_tokens=num_tokens, weight=weights[tenant])
            for tenant, num_tokens in (
                *[("small", 50)] * 16,
                *[("large", 210)] * 5,
                ("light", 100),
            )
        ]

    served = serve_for_a_while(queue(max_requests=10_000), offer)
    assert served[STANDARD, "light"] >= 0.95 * 400 * 100  # asks for less than its share: gets all
    rest = 400 * 1000 - served[STANDARD, "light"]
    assert served[STANDARD, "large"] == pytest.approx(rest * 3 / 4, rel=0.1)
    assert served[STANDARD, "small"] == pytest.approx(rest * 1 / 4, rel=0.1)


def test_queue_batch_keeps_its_weight_under_sustained_interactive_load() -> None:
    def offer(now_s: float) -> list[RouteRequest]:
        shapes = (*[(INTERACTIVE, 90, 40.0)] * 17, (BATCH, 500, None))
        return [
            request("t", arrived_s=now_s, num_tokens=n, ttft_s=ttft_s, service_class=name)
            for name, n, ttft_s in shapes
        ]

    served = serve_for_a_while(queue(max_requests=10_000), offer)
    assert sum(served.values()) == pytest.approx(400 * 1000, rel=0.01)
    assert served[BATCH, "t"] == pytest.approx(400 * 1000 / 9, rel=0.1)


def test_queue_one_class_alone_gets_everything() -> None:
    served = serve_for_a_while(
        queue(), lambda now_s: [request(arrived_s=now_s, num_tokens=500, service_class=BATCH)]
    )
    assert served[BATCH, ""] == 400 * 500


def test_queue_late_requests_hold_up_nobody_and_still_come() -> None:
    waiting = queue(burst=100, late=1.0)
    late = [request(arrived_s=0.0, ttft_s=1.0) for _ in range(10)]
    in_time = [request(arrived_s=3.0, ttft_s=5.0) for _ in range(40)]
    for one in (*late, *in_time):
        waiting.push(one, until_s=99.0)
    assert list(waiting.order(0.9))[:10] == late
    order = list(waiting.order(1.0))
    assert sum(one in late for one in order[:20]) == 4  # one of five: weights 1 and 4
    assert len(order) == 50
    for one in late[:5]:
        waiting.served(one)
    # Their share has had 500 tokens, which weigh as much as 2,000 of their class.
    assert not any(one in late for one in list(waiting.order(1.0))[:20])
    waiting.remove(late[5].request_id)
    waiting.check_invariants()


def test_queue_order_foresees_the_weights() -> None:
    waiting = queue(burst=100)
    for tenant, weight in (("small", 1.0), ("large", 3.0)):
        for _ in range(30):
            waiting.push(request(tenant, weight=weight), until_s=99.0)
    first = [one.tenant for one in waiting.order(0.0)][:40]
    assert first.count("large") == 30


def test_queue_burst_lets_the_sooner_due_go_first_across_tenants() -> None:
    one_by_one, by_time = queue(burst=1), queue(burst=10_000)
    early = [request("early", ttft_s=1.0) for _ in range(5)]
    later = [request("later", ttft_s=2.0) for _ in range(5)]
    for waiting in (one_by_one, by_time):
        for one in (*later, *early):
            waiting.push(one, until_s=99.0)
    assert list(by_time.order(0.0)) == early + later
    in_turn = [one for pair in zip(early, later, strict=True) for one in pair]
    assert list(one_by_one.order(0.0)) == in_turn


def test_queue_what_is_served_while_nobody_waits_makes_no_debt() -> None:
    waiting = queue(burst=1)
    for _ in range(50):
        waiting.served(request("regular", num_tokens=1000))
    regular, new = request("regular"), request("new", arrived_s=1.0)
    waiting.push(new, until_s=99.0)
    waiting.push(regular, until_s=99.0)
    assert list(waiting.order(0.0)) == [regular, new]
    waiting.served(request("regular", num_tokens=1000))  # past the queue: this one counts
    assert list(waiting.order(0.0)) == [new, regular]


@pytest.mark.parametrize(
    ("max_requests", "max_tokens", "words"),
    [
        (2, 10**6, r"2 requests wait .*gateway\.max_queued_requests=2"),
        (9, 250, r"200 prompt tokens wait .*request's 100 .*gateway\.max_queued_tokens=250"),
        (0, 10**6, r"0 requests wait .*gateway\.max_queued_requests=0"),
        (9, 99, r"0 prompt tokens wait .*gateway\.max_queued_tokens=99"),
    ],
)
def test_queue_beyond_a_bound_is_refused_by_name(
    max_requests: int, max_tokens: int, words: str
) -> None:
    waiting = queue(max_requests=max_requests, max_tokens=max_tokens)
    with pytest.raises(OverloadedError, match=words):
        for _ in range(3):
            waiting.push(request(), until_s=99.0)
    waiting.check_invariants()


def test_queue_room_that_was_left_can_be_taken_again() -> None:
    waiting = queue(max_requests=1, max_tokens=100)
    for leave in (waiting.served, lambda one: waiting.remove(one.request_id)):
        one = request()
        waiting.push(one, until_s=99.0)
        leave(one)
        assert (len(waiting), waiting.num_tokens) == (0, 0)
    waiting.push(request(), until_s=5.0)
    assert len(waiting.expired(5.0)) == 1
    waiting.push(request(), until_s=99.0)
    assert (len(waiting), waiting.num_tokens) == (1, 100)


def test_queue_expires_at_the_first_of_both_times_and_not_before() -> None:
    waiting = queue()
    assert waiting.next_expiry_s == math.inf
    by_queue = request(expires_s=50.0)
    by_client = request(expires_s=7.0)
    waiting.push(by_queue, until_s=10.0)
    waiting.push(by_client, until_s=10.0)
    assert waiting.next_expiry_s == 7.0
    assert waiting.expired(math.nextafter(7.0, 0.0)) == []
    assert waiting.expired(7.0) == [by_client]
    assert waiting.next_expiry_s == 10.0
    assert by_queue.request_id in waiting
    assert waiting.expired(10.0) == [by_queue]
    assert waiting.expired(1e9) == []
    assert by_queue.request_id not in waiting


def test_queue_order_that_is_being_read_does_not_change() -> None:
    waiting = queue()
    requests = [request("ab"[i % 2], arrived_s=i) for i in range(20)]
    for one in requests:
        waiting.push(one, until_s=99.0)
    expected = list(waiting.order(0.0))
    read = []
    for one in waiting.order(0.0):
        read.append(one)
        waiting.served(one)
        waiting.push(request("c"), until_s=99.0)
    assert read == expected
    assert len(waiting) == 20


steps = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "remove", "served", "expired", "order"]),
        st.integers(0, 99),
        st.sampled_from([None, 0.5, 3.0, 100.0]),
        st.sampled_from(list(ServiceClass)),
        st.sampled_from("abc"),
        st.integers(1, 5000),
    ),
    max_size=80,
)


@given(steps, st.sampled_from([1, 1000, 100_000]))
def test_queue_books_hold_through_any_history(history, burst) -> None:
    waiting = queue(max_requests=12, max_tokens=30_000, burst=burst)
    model: dict[str, tuple[RouteRequest, float]] = {}
    now_s = 0.0
    for step, number, ttft_s, service_class, tenant, num_tokens in history:
        chosen = list(model.values())[number % len(model)][0] if model else None
        if step == "push":
            one = request(
                tenant,
                num_tokens=num_tokens,
                arrived_s=now_s,
                ttft_s=ttft_s,
                service_class=service_class,
                expires_s=now_s + 2 + number,
            )
            total = sum(known.num_prompt_tokens for known, _ in model.values())
            has_room = len(model) < 12 and total + num_tokens <= 30_000
            try:
                waiting.push(one, until_s=now_s + 5.0)
            except OverloadedError:
                assert not has_room
            else:
                assert has_room
                model[one.request_id] = (one, min(one.expires_s, now_s + 5.0))
        elif step == "remove" and chosen is not None:
            waiting.remove(chosen.request_id)
            del model[chosen.request_id]
        elif step == "served":
            waiting.served(chosen or request(tenant))
            model.pop(chosen.request_id if chosen else "", None)
        elif step == "expired":
            now_s += number / 20
            over = [one.request_id for one, end_s in model.values() if end_s <= now_s]
            assert sorted(one.request_id for one in waiting.expired(now_s)) == sorted(over)
            for request_id in over:
                del model[request_id]
        order = list(waiting.order(now_s)) if step == "order" else []
        for place, one in enumerate(order):
            assert waiting.position(one.request_id) == place
        if step == "order":
            assert sorted(one.request_id for one in order) == sorted(model)
        assert waiting.next_expiry_s == min(
            (end_s for _, end_s in model.values()), default=math.inf
        )
        waiting.check_invariants()
