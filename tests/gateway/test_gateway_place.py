"""A request on its way to a replica: classes, refusals, the queue, deadlines, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from gateway_fakes import FakeLeader, Stage, eventually, stage
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tenant_files import KEYS, auth_config, bearer, sha256, write_tenants

from cluster.client import AsyncClient, Queued, Running
from cluster.config import ClusterConfig
from cluster.errors import DeadlineError, OverloadedError, UnavailableError
from cluster.gateway.generation import Generation
from cluster.gateway.parts import ClientCall
from cluster.router.dispatcher import Dispatcher
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from cluster.types import NO_SLO, SLO, EngineRequest, ReplicaLoad, SamplingParams, ServiceClass

FREE = ReplicaLoad(num_blocks=100, num_free_blocks=100)
FULL = ReplicaLoad(num_blocks=100, num_free_blocks=0, num_running=8, num_waiting=4)
SLOW = ReplicaLoad(num_blocks=100, num_free_blocks=100, prefill_token_s=1.0)
SOON = pb.LatencyObjective(ttft_s=0.5)


async def _generate(running: Stage, **fields: Any) -> pb.GenerateResponse:
    metadata = fields.pop("metadata", [])
    fields.setdefault("token_ids", pb.TokenIds(ids=[1, 2, 3]))
    request = pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=2), **fields)
    async with grpc.aio.insecure_channel(running.address) as channel:
        response: pb.GenerateResponse = await InferenceStub(channel).Generate(
            request, metadata=metadata, timeout=20
        )
    return response


def _details(error: grpc.aio.AioRpcError) -> tuple[str, float]:
    """Return the reason of an error, and the seconds after which it may be tried again."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in rpc_status.from_call(error).details:
        detail.Unpack(info)
        detail.Unpack(retry)
    return info.reason, retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9


def _slow_leader(name: str = "replica-1") -> FakeLeader:
    leader = FakeLeader(name)
    leader.load = SLOW
    return leader


@pytest.mark.integration
async def test_leader_learns_whose_request_it_is_and_of_which_class(tmp_path: Path) -> None:
    leader, auth = FakeLeader(), auth_config(tmp_path).model_dump()
    async with stage(leader, auth=auth) as running:
        await _generate(running, metadata=bearer(KEYS["alice"]))
        await _generate(running, metadata=bearer(KEYS["bob"]), service_class=pb.SERVICE_CLASS_BATCH)
    first, second = leader.submitted
    assert (first.tenant, first.service_class) == ("alice", ServiceClass.STANDARD)
    assert (second.tenant, second.service_class) == ("bob", ServiceClass.BATCH)
    assert first.slo == NO_SLO and first.tenant_weight == 1.0


@pytest.mark.integration
async def test_objective_that_cannot_be_met_is_refused_with_a_reason_and_counts_as_missed() -> None:
    leader = _slow_leader()
    async with stage(leader) as running:
        with pytest.raises(grpc.aio.AioRpcError, match=r"ttft_s=0\.5") as refused:
            await _generate(running, latency=SOON)
        await _generate(running)  # it has none
        assert running.value("sluice_goodput_total", met="false") == 1
        assert running.value("sluice_goodput_total", met="true") == 0
        labels = {"outcome": "refused", "service_class": "interactive"}
        assert running.value("sluice_admission_total", **labels) == 1
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    reason, retry_after_s = _details(refused.value)
    assert reason == "SLO_NOT_ATTAINABLE"
    assert retry_after_s > 1, "3 s of prefill are not done before"
    assert len(leader.submitted) == 1


@pytest.mark.integration
async def test_degraded_request_is_sent_without_its_objective() -> None:
    leader = _slow_leader()
    async with stage(leader, engine={"interactive": {"on_miss": "degrade"}}) as running:
        await _generate(running, latency=SOON, request_id="mine")
        async with grpc.aio.insecure_channel(running.address) as channel:
            ask = pb.ExplainRequest(request_id="mine")
            told = await InferenceStub(channel).Explain(ask)
        assert running.value("sluice_goodput_total", met="true") == 1, "it was kept all the same"
    (submitted,) = leader.submitted
    assert submitted.slo == NO_SLO
    assert told.outcome == pb.ADMISSION_OUTCOME_DEGRADED
    assert told.ttft_slo_s == 0.5


@pytest.mark.integration
async def test_goodput_counts_what_was_late_and_what_was_refused_but_not_what_was_wrong() -> None:
    leader = FakeLeader()
    bounds = {"max_inflight_requests": 1, "router": {"admission": "off"}}
    async with stage(leader, **bounds) as running:

        def counted() -> tuple[float, float]:
            return (
                running.value("sluice_goodput_total", met="true"),
                running.value("sluice_goodput_total", met="false"),
            )

        await _generate(running, latency=pb.LatencyObjective(ttft_s=60.0, tpot_s=60.0))
        assert counted() == (1, 0)
        await _generate(running, latency=pb.LatencyObjective(ttft_s=1e-9))
        await _generate(running, latency=pb.LatencyObjective(tpot_s=1e-9))
        assert counted() == (1, 2)
        await _generate(running)
        with pytest.raises(grpc.aio.AioRpcError, match="prefix"):
            await _generate(running, latency=SOON, prefix="unknown")
        assert counted() == (1, 2)
        leader.max_steps = 0
        hanging = asyncio.create_task(_generate(running))
        await eventually(lambda: leader.num_live == 1)
        with pytest.raises(grpc.aio.AioRpcError, match="max_inflight_requests=1"):
            await _generate(running, latency=SOON)
        assert counted() == (1, 3)
        hanging.cancel()


@pytest.mark.integration
async def test_request_waits_while_replicas_are_full() -> None:
    leader = FakeLeader()
    leader.load = FULL
    async with stage(leader) as running, AsyncClient(running.address) as client:
        first, second = (client.stream("x", sampling={"max_tokens": 1}) for _ in range(2))
        assert await anext(first) == Queued(0)
        assert await anext(second) == Queued(1)
        assert running.value("sluice_queued_requests") == 2
        assert (await client.status()).num_queued == 2
        assert leader.submitted == []
        leader.push_load(FREE)
        assert await anext(first) == Running("replica-1")
        assert await anext(second) == Running("replica-1")
        for events in (first, second):
            async for _ in events:
                pass
        assert running.value("sluice_queue_seconds_count") == 2
        assert running.value("sluice_queued_requests") == 0


@pytest.mark.integration
async def test_full_queue_refuses_with_its_own_reason() -> None:
    async with stage(max_queued_requests=0) as running:
        with pytest.raises(grpc.aio.AioRpcError, match="max_queued_requests=0") as refused:
            await _generate(running)
    reason, retry_after_s = _details(refused.value)
    assert (refused.value.code(), reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert retry_after_s > 0


@pytest.mark.integration
async def test_client_that_leaves_the_queue_leaves_nothing_behind() -> None:
    rarely = {"load_interval_s": 3600.0}  # the new replica itself has the queue looked at
    async with stage(replica=rarely) as running, AsyncClient(running.address) as client:
        events = [client.stream("x") for _ in range(5)]
        for stream in events:
            assert isinstance(await anext(stream), Queued)
        for stream in events[1:]:
            await stream.aclose()
        await eventually(lambda: running.dispatcher.num_queued == 1)
        assert running.dispatcher.num_queued_tokens == 1
        leader = await running.add(FakeLeader())
        assert [e async for e in events[0]]
        assert len(leader.submitted) == 1


@pytest.mark.integration
async def test_deadline_that_passes_in_the_queue_ends_the_request_there() -> None:
    async with stage() as running, AsyncClient(running.address) as client:
        with pytest.raises(DeadlineError):
            await client.generate("x", timeout_s=0.1)
        await eventually(lambda: running.server.num_inflight == 0)
        leader = await running.add(FakeLeader())
        await client.generate("y", sampling={"max_tokens": 1})
        assert len(leader.submitted) == 1


async def test_request_whose_deadline_is_over_is_never_placed() -> None:
    dispatcher = Dispatcher(ClusterConfig(), rng=random.Random(1))
    ended: list[str] = []
    parts: Any = SimpleNamespace(
        config=ClusterConfig(),
        tokenizer=SimpleNamespace(new_decoder=None),
        dispatcher=dispatcher,
        waiting=SimpleNamespace(end=ended.append),
        trial=None,
        running={},
        journals=SimpleNamespace(begin=lambda header, **_: SimpleNamespace(close=lambda: None)),
        hand_overs=SimpleNamespace(done=lambda request: None),
    )

    async def send(event: pb.GenerateStreamResponse) -> None:
        raise AssertionError(f"sent {event}")

    call = ClientCall("r", lambda: 0.0, send)
    request = EngineRequest("r", (1, 2), SamplingParams())
    with pytest.raises(DeadlineError):
        await Generation(parts, call, request).run()
    assert dispatcher.explain("r") is None
    assert ended == ["r"]


class Calls:
    """Counts what a gateway tells its dispatcher, by request."""

    def __init__(self, running: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        self.requests: list[Any] = []
        self._running = running
        for name in ("submit", "on_first_token", "on_end"):
            self._count(name, monkeypatch)

    def _count(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(self._running.dispatcher, name)

        def call(*args: Any, **options: Any) -> Any:
            self.counts[name] += 1
            if name == "submit":
                self.requests.append(args[0])
            return real(*args, **options)

        monkeypatch.setattr(self._running.dispatcher, name, call)

    async def take(self) -> dict[str, int]:
        """Return the counts once nothing is in flight, and begin anew."""
        await eventually(lambda: self._running.server.num_inflight == 0)
        assert self._running.dispatcher.table.column("num_open").sum() == 0
        counts, self.counts = dict(self.counts), Counter()
        return counts


@pytest.mark.integration
async def test_dispatcher_hears_of_every_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = FakeLeader("a")
    async with stage(leader) as running, AsyncClient(running.address) as client:
        calls = Calls(running, monkeypatch)
        await client.generate("x", sampling={"max_tokens": 5})
        assert await calls.take() == {"submit": 1, "on_first_token": 1, "on_end": 1}
        leader.max_steps = 1
        with pytest.raises(DeadlineError):
            await client.generate("x", sampling={"max_tokens": 5}, timeout_s=0.3)
        assert await calls.take() == {"submit": 1, "on_first_token": 1, "on_end": 1}
        leader.max_steps = 0
        with pytest.raises(DeadlineError):
            await client.generate("x", timeout_s=0.3)
        assert await calls.take() == {"submit": 1, "on_end": 1}
        leader.refusal = "RESOURCE_EXHAUSTED: 8 requests wait, limit=8: try again later"
        with pytest.raises(OverloadedError):
            await client.generate("x")
        assert await calls.take() == {"submit": 1, "on_end": 1}
        leader.refusal, leader.max_steps = "INTERNAL: broken", None
        other = await running.add(FakeLeader("b"))
        leader.refusal = other.refusal = "UNAVAILABLE: stopping"
        with pytest.raises(UnavailableError):
            await client.generate("x", resume_timeout_s=0)
        assert await calls.take() == {"submit": 2, "on_end": 2}  # an attempt each


@pytest.mark.integration
async def test_requests_that_end_anywhere_leave_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = FakeLeader()
    leader.step_s = 0.003
    async with stage(leader) as running, AsyncClient(running.address) as client:
        calls = Calls(running, monkeypatch)

        async def one(index: int) -> None:
            with contextlib.suppress(TimeoutError, DeadlineError):
                async with asyncio.timeout(index % 40 / 80):
                    await client.generate("x", sampling={"max_tokens": 10})

        await asyncio.gather(*(one(index) for index in range(200)))
        await client.generate("x", sampling={"max_tokens": 1})
        counts = await calls.take()
        assert counts["submit"] == counts["on_end"] > 1
        running.dispatcher.table.check_invariants()


@pytest.mark.integration
async def test_router_is_told_session_deadline_and_weight(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    auth = auth_config(tmp_path).model_dump()
    async with stage(FakeLeader(), auth=auth) as running:
        calls = Calls(running, monkeypatch)
        for name in ("alice", "bob", "alice"):
            await _generate(running, session="chat", metadata=bearer(KEYS[name]))
        with pytest.raises(grpc.aio.AioRpcError, match="session has 129") as refused:
            await _generate(running, session="x" * 129, metadata=bearer(KEYS["alice"]))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    first, second, third = calls.requests
    assert first.session == third.session != second.session
    assert first.tenant == "alice" and first.model == "sluice-demo"
    assert 15 < first.expires_s - first.arrived_s < 21
    assert first.slo == SLO()


@pytest.mark.integration
async def test_first_token_is_held_against_what_was_predicted() -> None:
    leader = _slow_leader()
    async with stage(leader) as running:
        await _generate(running)
        assert running.value("sluice_ttft_prediction_ratio_count") == 1
        assert 0 < running.value("sluice_ttft_prediction_ratio_sum") < 1, "3 s were predicted"


@pytest.mark.integration
async def test_limits_of_a_tenant_hold_before_the_gateway(tmp_path: Path) -> None:
    limits = {"requests_per_minute": 2, "tokens_per_minute": 100, "weight": 3.0}
    tenant = {"name": "alice", "key_sha256": [sha256(KEYS["alice"])], **limits}
    auth = {"tenants_file": str(write_tenants(tmp_path, [tenant]))}
    alice, leader = bearer(KEYS["alice"]), FakeLeader()
    async with stage(leader, auth=auth) as running:
        with pytest.raises(grpc.aio.AioRpcError, match="tokens_per_minute=100") as refused:
            await _generate(running, metadata=alice, token_ids=pb.TokenIds(ids=[1] * 99))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        for _ in range(2):
            await _generate(running, metadata=alice)
        with pytest.raises(grpc.aio.AioRpcError, match="requests_per_minute=2") as refused:
            await _generate(running, metadata=alice)
    assert _details(refused.value)[0] == "RATE_LIMITED"
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert [request.tenant_weight for request in leader.submitted] == [3.0, 3.0]


@pytest.mark.integration
async def test_second_attempt_is_what_explain_tells() -> None:
    refusing, serving = FakeLeader("a"), FakeLeader("b")
    refusing.refusal = "RESOURCE_EXHAUSTED: 8 requests wait, limit=8: try again later"
    async with stage(refusing, serving) as running, AsyncClient(running.address) as client:
        for number in range(6):
            await client.generate("x", sampling={"max_tokens": 2}, request_id=f"q{number}")
            explanation = await client.explain(f"q{number}")
            assert explanation.chosen is not None and explanation.chosen.replica_id == "b"
