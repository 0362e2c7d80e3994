"""Streams that go on while nobody listens."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from gateway_fakes import FakeLeader, Stage, eventually, stage
from resume_fakes import begin, connected, nothing, read, refusal, resume, two_gateways

from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from cluster.types import SampledToken

pytestmark = pytest.mark.integration

SCRIPT = [64 + step % 30 for step in range(60)]


def _leader(step_s: float = 0.01) -> FakeLeader:
    leader = FakeLeader()
    leader.step_s = step_s
    leader.script = [SampledToken(token) for token in SCRIPT[:30]]
    return leader


async def _is_detached(running: Stage) -> bool:
    """Return whether a request runs without its call."""
    has_gone = running.value("sluice_requests_total", code="CANCELLED") == 1
    return has_gone and running.server._detached.num_live == 1


@pytest.mark.parametrize("closes_channel", [False, True])
async def test_request_goes_on_without_its_client_and_is_fetched_at_another_gateway(
    closes_channel: bool,
) -> None:
    leader = _leader()
    async with two_gateways(leader) as (first, second), connected(second) as other:
        async with grpc.aio.insecure_channel(first.address) as channel:
            call = begin(InferenceStub(channel), max_tokens=60, detach_s=60.0)
            received = await read(call, nothing(), 5)
            if not closes_channel:
                call.cancel()
        await eventually(lambda: _is_detached(first))
        assert first.server.num_inflight == 1, "it keeps its place"
        await eventually(lambda: first.server.num_inflight == 0)
        assert first.value("sluice_completion_tokens_total") == 60
        assert leader.cancelled == []
        await first.server._journals.flush()
        await read(resume(other, received), received)
        assert received.token_ids == SCRIPT
        assert received.seqs == list(range(len(received.seqs)))
        assert received.finished is not None
        assert len(leader.submitted) == 1, "what is complete is not generated again"


async def test_client_that_comes_back_ends_what_goes_on_without_it() -> None:
    leader = _leader()
    async with stage(leader) as running, connected(running) as stub:
        call = begin(stub, max_tokens=60, detach_s=60.0)
        received = await read(call, nothing(), 5)
        call.cancel()
        await eventually(lambda: _is_detached(running))
        await read(resume(stub, received, detach_s=60.0), received)
        assert received.token_ids == SCRIPT
        assert running.server._detached.num_live == 0
        assert running.value("sluice_superseded_requests_total") == 1
        await eventually(lambda: leader.num_live == 0)


async def test_request_ends_when_its_client_stays_away_and_can_still_be_resumed() -> None:
    leader = _leader(0.05)
    async with two_gateways(leader) as (first, second), connected(first) as stub:
        call = begin(stub, max_tokens=60, detach_s=0.2)
        received = await read(call, nothing(), 3)
        await asyncio.sleep(0.4)
        assert leader.num_live == 1, "its time begins when the client goes"
        call.cancel()
        await eventually(lambda: leader.num_live == 0, 3.0)
        assert first.server.num_inflight == first.server._detached.num_live == 0
        await first.server._journals.flush()
        leader.step_s = 0.0
        async with connected(second) as other:
            await read(resume(other, received), received)
        assert received.token_ids == SCRIPT
        assert len(leader.submitted[-1].output_token_ids) >= 8, "it had gone on for a while"


async def test_deadline_of_the_call_ends_a_request_that_has_lost_it() -> None:
    leader = _leader(0.02)
    leader.max_steps = 3
    async with stage(leader) as running, connected(running) as stub:
        call = begin(stub, max_tokens=60, detach_s=60.0, timeout_s=0.5)
        await read(call, nothing(), 1)
        call.cancel()
        await eventually(lambda: _is_detached(running))
        (generation,) = running.server._running.values()
        remaining_s = generation._call.remaining_s()
        assert remaining_s is not None and -60 < remaining_s < 0.5
        (request,) = leader.submitted
        assert request.deadline_s is not None and request.deadline_s <= 0.5


async def test_detached_client_that_stays_sees_no_difference() -> None:
    async with stage(_leader(0.0)) as running, connected(running) as stub:
        plain = await read(begin(stub, "plain", max_tokens=60), nothing())
        detached = await read(begin(stub, "other", max_tokens=60, detach_s=5.0), nothing())
        assert (plain.token_ids, plain.text) == (detached.token_ids, detached.text)
        assert detached.seqs == list(range(len(detached.seqs)))
        assert running.server._detached.num_live == 0


async def test_detached_request_that_fails_tells_a_client_that_stays() -> None:
    leader = _leader()
    leader.refusal = "RESOURCE_EXHAUSTED: full"
    async with stage(leader) as running, connected(running) as stub:
        code, _, message = await refusal(begin(stub, detach_s=5.0))
        assert (code, message) == ("RESOURCE_EXHAUSTED", "full")
        assert running.value("sluice_requests_total", code="RESOURCE_EXHAUSTED") == 1


@pytest.mark.parametrize("detach_s", [-1.0, 601.0, float("nan"), float("inf")])
async def test_time_out_of_bounds_is_refused_in_both_methods(detach_s: float) -> None:
    async with stage(_leader()) as running, connected(running) as stub:
        for call in (begin(stub, detach_s=detach_s), resume(stub, nothing(), detach_s=detach_s)):
            code, _, message = await refusal(call)
            assert code == "INVALID_ARGUMENT"
            assert "gateway.max_detach_s=600" in message
