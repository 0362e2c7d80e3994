"""A gateway that leaves, and replicas that are asked to."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import grpc
import psutil
import pytest
from gateway_fakes import FakeLeader, eventually, stage
from grpc_health.v1 import health_pb2, health_pb2_grpc
from resume_fakes import begin, connected, nothing, read, refusal, resume, two_gateways
from tenant_files import KEYS, auth_config, bearer

from cluster.errors import RESUME_ELSEWHERE, UnavailableError
from cluster.gateway.fleet import GATEWAY_LEASES
from cluster.gateway.generation import Generation
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from cluster.types import ReplicaLoad, SampledToken

pytestmark = pytest.mark.integration

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _leader(step_s: float = 0.02) -> FakeLeader:
    leader = FakeLeader()
    leader.step_s = step_s
    leader.script = [SampledToken(token) for token in range(64, 94)]
    return leader


async def test_drain_lets_streams_finish_and_refuses_new_ones() -> None:
    leader = _leader()
    async with stage(leader) as running, connected(running) as stub:
        call = begin(stub)
        received = await read(call, nothing(), 1)
        running.server.check_health()
        stopping = asyncio.create_task(running.server.stop(10.0))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="shutting down"):
            running.server.check_health()
        async with connected(running) as other:
            assert (await refusal(begin(other, "new")))[0] == "UNAVAILABLE"
        assert not received.finished
        await read(call, received)
        assert len(received.token_ids) == 40
        async with asyncio.timeout(4.0):
            await stopping
        assert (await refusal(begin(stub, "new")))[0] == "UNAVAILABLE"


def _num_listening(port: int) -> int:
    connections = psutil.Process().net_connections("tcp")
    return sum(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


async def test_drain_tells_health_watchers_and_moves_connections_to_the_next_gateway() -> None:
    with socket.socket() as reserved:  # a free port, kept free until it is used
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        leader = _leader()
        async with two_gateways(leader, port=port, num_replicas=2) as (first, second):
            reserved.close()
            async with grpc.aio.insecure_channel(first.address) as channel:
                stub = InferenceStub(channel)
                call = begin(stub, max_tokens=60)
                received = await read(call, nothing(), 3)
                old, new = (first, second) if first.server.num_inflight else (second, first)
                health = health_pb2_grpc.HealthStub(channel)
                watch = health.Watch(health_pb2.HealthCheckRequest())
                assert (await watch.read()).status == SERVING
                num_listening = _num_listening(port)
                stopping = asyncio.create_task(old.server.stop(10.0))
                assert (await watch.read()).status == NOT_SERVING
                # What the kernel had accepted for a socket that closes is reset: clients try again.
                await eventually(lambda: _num_listening(port) <= num_listening / 2)
                for index in range(8):  # each on a connection of its own, and on the old one
                    async with connected(first) as other:
                        await read(begin(other, f"other {index}", max_tokens=2), nothing())
                    await read(begin(stub, f"same {index}", max_tokens=2), nothing())
                assert new.value("sluice_requests_total", code="OK") == 16
                await read(call, received)
                assert len(received.token_ids) == 60
                await stopping


async def test_drain_that_takes_too_long_sends_streams_elsewhere() -> None:
    leader = _leader()
    async with two_gateways(leader) as (first, second), connected(first) as stub:
        calls = [begin(stub, f"r{index}", max_tokens=100) for index in range(4)]
        received = [await read(call, nothing(), 3) for call in calls]
        stopping = asyncio.create_task(first.server.stop(0.1))
        for call, so_far in zip(calls, received, strict=True):
            code, reason, message = await refusal(call, so_far)
            assert (code, reason) == ("UNAVAILABLE", RESUME_ELSEWHERE)
            assert "shutting down" in message
        async with asyncio.timeout(4.0):
            await stopping
        assert first.server.num_inflight == 0
        assert not first.server._running
        async with connected(second) as other:
            for index, so_far in enumerate(received):
                # All that was sent is in the journals now: the position is enough.
                going_on = resume(other, so_far, f"r{index}", has_tokens=False)
                await read(going_on, so_far)
                assert so_far.token_ids == [64 + step % 30 for step in range(100)]
                assert so_far.seqs == list(range(len(so_far.seqs)))


async def test_drain_ends_requests_that_wait_for_a_replica_in_vain() -> None:
    async with stage() as running, connected(running) as stub:
        call = begin(stub)
        assert (await call.read()).HasField("queued")
        stopping = asyncio.create_task(running.server.stop(0.05))
        code, reason, message = await refusal(call)
        assert (code, reason) == ("UNAVAILABLE", RESUME_ELSEWHERE)
        assert "shutting down" in message
        await stopping
        assert running.server.num_inflight == 0


async def test_drain_of_the_only_gateway_lets_requests_wait() -> None:
    async with stage() as running, connected(running) as stub:
        call = begin(stub)
        assert (await call.read()).HasField("queued")
        await running.store.put_lease(GATEWAY_LEASES, "gateway-1", b"", 60.0)
        await asyncio.sleep(0.6)  # two looks at the leases
        stopping = asyncio.create_task(running.server.stop(20.0))
        await running.add(_leader(0.0))
        received = nothing()
        received.seqs.append(0)
        await read(call, received)
        assert len(received.token_ids) == 40
        await stopping


async def test_drain_sends_requests_that_wait_to_another_gateway_at_once() -> None:
    async with two_gateways() as (first, second), connected(first) as stub:
        for gateway_id in ("gateway-1", "gateway-2"):
            await first.store.put_lease(GATEWAY_LEASES, gateway_id, b"", 60.0)
        await eventually(lambda: first.server._fleet.has_peers)
        call = begin(stub)
        received = nothing()
        received.take(await call.read())
        stopping = asyncio.create_task(first.server.stop(60.0))
        code, reason, _ = await refusal(call, received)
        assert (code, reason) == ("UNAVAILABLE", RESUME_ELSEWHERE)
        await second.add(_leader(0.0))
        async with connected(second) as other:
            await read(resume(other, received), received)
        assert len(received.token_ids) == 40
        async with asyncio.timeout(4.0):
            await stopping


async def test_drain_ends_a_detached_request_and_leaves_its_journal() -> None:
    leader = _leader()
    async with two_gateways(leader) as (first, second), connected(first) as stub:
        call = begin(stub, max_tokens=200, detach_s=60.0)
        received = await read(call, nothing(), 3)
        call.cancel()
        await eventually(lambda: first.value("sluice_requests_total", code="CANCELLED") == 1)
        assert first.server._detached.num_live == 1
        await first.server.stop(0.1)
        assert first.server._detached.num_live == 0
        async with connected(second) as other:
            await read(resume(other, received), received)
        assert received.token_ids == [64 + step % 30 for step in range(200)]


async def test_replica_that_drains_hands_its_requests_over() -> None:
    leaders = [_leader(), _leader()]
    leaders[1].replica_id = "replica-2"
    async with stage(*leaders) as running, connected(running) as stub:
        call = begin(stub)
        received = await read(call, nothing(), 3)
        old, new = leaders if leaders[0].num_live else leaders[::-1]
        old.push_load(ReplicaLoad(num_blocks=100, num_free_blocks=100, is_draining=True))
        await eventually(lambda: len(new.submitted) == 1)
        await read(call, received)
        assert received.token_ids == [64 + step % 30 for step in range(40)]
        assert len(old.submitted) == 1 and old.num_live == 0
        assert running.value("sluice_resumptions_total", cause="moved") == 1


async def test_replica_that_an_administrator_asks_to_leave_is_told(tmp_path: Path) -> None:
    auth = auth_config(tmp_path).model_dump()
    leader = _leader()
    async with stage(leader, auth=auth) as running, connected(running) as stub:
        call = begin(stub, metadata=bearer(KEYS["alice"]))
        await read(call, nothing(), 1)
        message = pb.DrainReplicaRequest(replica_id="replica-1")
        for metadata, code in (
            ([], grpc.StatusCode.UNAUTHENTICATED),
            (bearer(KEYS["alice"]), grpc.StatusCode.PERMISSION_DENIED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.DrainReplica(message, metadata=metadata)
            assert refused.value.code() is code
        assert leader.num_drained == 0
        root = bearer(KEYS["root"])
        assert (await stub.DrainReplica(message, metadata=root)).num_requests == 1
        assert leader.num_drained == 1
        with pytest.raises(grpc.aio.AioRpcError, match="'replica-9' is none") as refused:
            await stub.DrainReplica(pb.DrainReplicaRequest(replica_id="replica-9"), metadata=root)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        call.cancel()


async def test_first_event_on_its_way_does_not_keep_a_stopped_call_from_its_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: asyncio.Queue[None] = asyncio.Queue()
    run = Generation.run

    async def noted(generation: Generation) -> bool:
        begun.put_nowait(None)
        return await run(generation)

    monkeypatch.setattr(Generation, "run", noted)
    async with stage(_leader()) as running, connected(running) as stub:
        for index in range(20):
            call = begin(stub, f"r{index}", timeout_s=5.0)
            await begun.get()
            for _ in range(index):
                await asyncio.sleep(0)
            error = UnavailableError("over", reason=RESUME_ELSEWHERE)
            for generation in running.server._running.values():
                generation.stop(error)
            assert (await refusal(call))[:2] == ("UNAVAILABLE", RESUME_ELSEWHERE)
