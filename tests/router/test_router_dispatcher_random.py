"""Random histories of one gateway's decisions: none is lost, no count is left behind."""

from __future__ import annotations

import math

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from route_fakes import IDLE, info, load, request
from test_router_dispatcher import BUSY, FULL, counts, dispatcher

from cluster.router.route import OutcomeKind, RouteRequest
from cluster.types import ReplicaLoad, ServiceClass

LOADS = st.sampled_from([IDLE, FULL, BUSY, load(num_free_blocks=20), load(is_draining=True)])
REQUESTS = st.builds(
    request,
    st.integers(1, 400),
    ttft_s=st.sampled_from([None, 0.1, 2.0]),
    service_class=st.sampled_from(ServiceClass),
    tenant=st.sampled_from(["", "t"]),
    expires_s=st.sampled_from([math.inf, 5.0, 50.0]),
)


class DispatcherMachine(RuleBasedStateMachine):
    """Whatever happens to requests and replicas, none is lost and no count is left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.target = dispatcher(max_queued_requests=5, max_queued_tokens=1000, queue_timeout_s=20)
        self.waiting: dict[str, RouteRequest] = {}
        self.flying: dict[str, RouteRequest] = {}

    @rule(name=st.sampled_from("abc"), its_load=LOADS)
    def connect(self, name: str, its_load: ReplicaLoad) -> None:
        self.target.index.replace(name, [])
        self.target.table.add(info(name), its_load, now_s=self.now_s)

    @rule(name=st.sampled_from("abc"))
    def lose(self, name: str) -> None:
        self.target.table.remove(name)
        self.target.index.drop(name)

    @rule(name=st.sampled_from("abc"), its_load=LOADS)
    def report(self, name: str, its_load: ReplicaLoad) -> None:
        self.target.table.on_load(name, its_load, now_s=self.now_s)

    @rule(route=REQUESTS)
    def submit(self, route: RouteRequest) -> None:
        outcome = self.target.submit(route, self.now_s)
        if outcome.kind is OutcomeKind.QUEUED:
            self.waiting[route.request_id] = route
        elif outcome.is_dispatched:
            self.flying[route.request_id] = route
        else:
            assert outcome.kind is OutcomeKind.REFUSED and outcome.reason
            assert 0 < outcome.retry_after_s < math.inf

    @rule()
    def poll(self) -> None:
        for route, outcome in self.target.poll(self.now_s):
            del self.waiting[route.request_id]
            if outcome.is_dispatched:
                self.flying[route.request_id] = route

    @rule(delta_s=st.sampled_from([0.01, 1.0, 10.0]))
    def wait(self, delta_s: float) -> None:
        self.now_s += delta_s

    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from([*self.flying, "unknown"]))
        self.target.on_first_token(request_id, self.now_s)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from([*self.flying, *self.waiting, "unknown"]))
        self.target.on_end(request_id)
        self.flying.pop(request_id, None)
        self.waiting.pop(request_id, None)

    @invariant()
    def is_sound(self) -> None:
        self.target.table.check_invariants()
        out = {route.request_id for route, _ in self.target._pushed_out}
        waiting = [route for name, route in self.waiting.items() if name not in out]
        assert self.target.num_queued == len(waiting) <= 5
        assert self.target.num_queued_tokens == sum(route.num_prompt_tokens for route in waiting)
        assert counts(self.target)["num_open"] <= len(self.flying)

    def teardown(self) -> None:
        for request_id in [*self.flying, *self.waiting]:
            self.target.on_end(request_id)
        assert not any(counts(self.target).values())
        assert not self.target._flights and not self.target.num_queued
        assert self.target.next_poll_s() == math.inf


TestDispatcherMachine = DispatcherMachine.TestCase
TestDispatcherMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
