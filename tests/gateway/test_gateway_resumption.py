"""Answers whose replica is lost, drains or refuses them: they go on elsewhere, exactly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from gateway_fakes import FINGERPRINT, FakeLeader, Stage, eventually, stage

from cluster.client import AsyncClient, Event, Finished, Running, TextDelta
from cluster.errors import (
    FailedPreconditionError,
    OverloadedError,
    PoisonError,
    UnavailableError,
)
from cluster.types import EngineOutput, EngineRequest, ReplicaLoad

NUM_TOKENS = 12
SAMPLING = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
ANSWER = tuple(range(64, 64 + NUM_TOKENS))  # of every fake leader


class DyingLeader(FakeLeader):
    """Reports that its group has failed, as soon as it gets a request with the fatal prompt."""

    fatal: tuple[int, ...] = (13,)

    async def _answer(self, request: EngineRequest, outputs: asyncio.Queue[EngineOutput]) -> None:
        if request.prompt_token_ids == self.fatal:
            for live in self.submitted:
                outputs.put_nowait(EngineOutput(live.request_id, error="LOST: worker 0 died"))
            self.submitted.clear()
            return
        await super()._answer(request, outputs)


def busy(leader: FakeLeader) -> FakeLeader:
    """Return a leader that requests go to only where there is no other one."""
    leader.load = ReplicaLoad(num_running=999, num_blocks=100, num_free_blocks=100)
    return leader


def tokens_of(events: list[Event]) -> tuple[int, ...]:
    return tuple(t for e in events if isinstance(e, TextDelta) for t in e.token_ids)


def replicas_of(events: list[Event]) -> list[str]:
    return [e.replica_id for e in events if isinstance(e, Running)]


async def read_until(events: AsyncIterator[Event], num_tokens: int) -> list[Event]:
    """Return the first events, up to one with which so many tokens are there."""
    read = [await anext(events)]
    while len(tokens_of(read)) < num_tokens:
        read.append(await anext(events))
    return read


def stream(client: AsyncClient, **options: Any) -> AsyncIterator[Event]:
    """Return a stream whose client does nothing for it: what goes on is the gateway's doing."""
    return client.stream("x", sampling=SAMPLING, resume_timeout_s=0, **options)


@pytest.mark.parametrize("num_tokens", [0, 1, 5, NUM_TOKENS - 1])
async def test_answer_of_a_lost_replica_goes_on_exactly(num_tokens: int) -> None:
    first, second = FakeLeader("a"), busy(FakeLeader("b"))
    first.max_steps = num_tokens
    async with stage(first, second) as running, AsyncClient(running.address) as client:
        events = stream(client)
        read = await read_until(events, num_tokens)
        await eventually(lambda: first.num_live == 1)
        await first.die()
        read += [event async for event in events]
        assert tokens_of(read) == ANSWER
        assert replicas_of(read) == ["a", "b"]
        (request,) = second.submitted
        assert request.output_token_ids == ANSWER[:num_tokens]
        finished = read[-1]
        assert isinstance(finished, Finished)
        assert finished.usage.completion_tokens == NUM_TOKENS
        assert running.value("sluice_completion_tokens_total") == NUM_TOKENS
        assert running.value("sluice_resumptions_total", cause="lost") == 1
        assert running.value("sluice_gap_seconds_count", cause="lost") == bool(num_tokens)


async def test_answer_goes_on_where_no_admission_would_let_it_in() -> None:
    first, second = FakeLeader("a"), busy(FakeLeader("b"))
    first.max_steps = 3
    slow = ReplicaLoad(late_s=100.0, prefill_token_s=1.0, num_blocks=100, num_free_blocks=100)
    async with stage(first, second) as running, AsyncClient(running.address) as client:
        events = stream(client, ttft_s=0.5, service_class=None)
        read = await read_until(events, 3)
        second.push_load(slow)
        await asyncio.sleep(0.1)
        await first.die()
        read += [event async for event in events]
        assert tokens_of(read) == ANSWER


async def test_failed_group_whose_leader_lives_is_a_lost_replica() -> None:
    first, second = FakeLeader("a"), busy(FakeLeader("b"))
    first.refusal = "LOST: worker 1 does not answer"
    async with stage(first, second) as running, AsyncClient(running.address) as client:
        read = [event async for event in stream(client)]
        assert tokens_of(read) == ANSWER and replicas_of(read) == ["a", "b"]
        assert running.value("sluice_resumptions_total", cause="lost") == 1


async def _keep_alive(leader: FakeLeader) -> None:
    for seq in range(1, 1000):
        await asyncio.sleep(0.05)
        leader.push(seq=seq)


async def test_silent_leader_loses_its_requests_to_another() -> None:
    first, second = FakeLeader("a"), busy(FakeLeader("b"))
    first.max_steps = 2
    async with (
        stage(first, second, replica={"heartbeat_timeout_s": 0.3}) as running,
        AsyncClient(running.address) as client,
    ):
        speaking = asyncio.create_task(_keep_alive(second))
        events = stream(client)
        read = await read_until(events, 2)
        first.is_silent = True
        read += [event async for event in events]
        speaking.cancel()
        assert tokens_of(read) == ANSWER and replicas_of(read) == ["a", "b"]


async def test_draining_replica_hands_its_requests_over() -> None:
    first = FakeLeader("a")
    first.max_steps = 4
    async with stage(first) as running, AsyncClient(running.address) as client:
        streams = [stream(client) for _ in range(20)]
        reads = [await read_until(events, 4) for events in streams]
        await running.add(FakeLeader("b"))
        first.push_load(ReplicaLoad(is_draining=True))
        for read, events in zip(reads, streams, strict=True):
            read += [event async for event in events]
            assert tokens_of(read) == ANSWER and replicas_of(read) == ["a", "b"]
        assert running.value("sluice_resumptions_total", cause="moved") == 20
        assert first.num_live == 0


async def test_draining_replica_keeps_its_requests_until_another_takes_them() -> None:
    first = FakeLeader("a")
    first.max_steps = 4
    async with stage(first) as running, AsyncClient(running.address) as client:
        events = stream(client)
        read = await read_until(events, 4)
        first.push_load(ReplicaLoad(is_draining=True))
        await running.wait_state("a", "draining")
        assert first.num_live == 1
        await running.add(FakeLeader("b"))
        read += [event async for event in events]
        assert tokens_of(read) == ANSWER and replicas_of(read) == ["a", "b"]


class OtherModel(FakeLeader):
    async def start(self) -> Any:
        info = await super().start()
        return type(info)(
            **{
                name: getattr(info, name)
                for name in info.__dataclass_fields__
                if name != "fingerprint"
            },
            fingerprint=(b"\x08" * len(FINGERPRINT)).hex(),
        )


async def test_answer_does_not_go_on_with_another_version_of_the_model() -> None:
    first, other = FakeLeader("a"), busy(OtherModel("b"))
    first.max_steps = 3
    async with (
        stage(first, other, queue_timeout_s=0.3) as running,
        AsyncClient(running.address) as client,
    ):
        events = stream(client)
        await read_until(events, 3)
        await first.die()
        with pytest.raises(FailedPreconditionError, match="another version of the model"):
            async for _ in events:
                pass
        assert other.submitted == []
        fresh = [event async for event in stream(client)]
        assert tokens_of(fresh) == ANSWER  # what has no token yet may go there


async def test_replica_that_refuses_for_a_while_is_asked_again_by_an_admitted_request() -> None:
    first, second = FakeLeader("a"), busy(FakeLeader("b"))
    first.max_steps = 3
    second.refusal = "UNAVAILABLE: the replica starts"
    async with stage(first, second) as running, AsyncClient(running.address) as client:
        events = stream(client)
        read = await read_until(events, 3)
        await first.die()
        await eventually(lambda: len(second.submitted) >= 3)
        second.refusal = ""
        read += [event async for event in events]
        assert tokens_of(read) == ANSWER


async def test_poisonous_request_fails_after_two_replicas_and_no_other_one_does() -> None:
    leaders = [DyingLeader(name) for name in "abc"]
    for leader in leaders:
        leader.step_s = 0.02
    async with stage(*leaders) as running, AsyncClient(running.address) as client:
        streams = [stream(client) for _ in range(6)]
        reads = [await read_until(events, 1) for events in streams]
        bystanders = [asyncio.create_task(_collect(events)) for events in streams]
        with pytest.raises(PoisonError, match="2 replicas died"):
            await client.generate(token_ids=[13], sampling=SAMPLING, resume_timeout_s=0)
        for read, rest in zip(reads, await asyncio.gather(*bystanders), strict=True):
            assert tokens_of([*read, *rest]) == ANSWER
        assert running.value("sluice_quarantined_requests_total") == 1
        await _is_quiet(running)


async def _collect(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


async def test_number_of_lost_replicas_is_bounded() -> None:
    leaders = [FakeLeader(name) for name in "abcd"]
    for leader in leaders:
        leader.max_steps = 2
    async with stage(*leaders, max_attempts=3) as running, AsyncClient(running.address) as client:
        events = stream(client)
        read = await read_until(events, 2)
        with pytest.raises(UnavailableError, match=r"gateway\.max_attempts=3"):
            while True:
                current = next(x for x in leaders if x.replica_id == replicas_of(read)[-1])
                await current.die()
                read += await read_until(events, 2)
        assert tokens_of(read) == ANSWER[: len(tokens_of(read))]
        await _is_quiet(running)


async def test_request_that_was_refused_is_not_let_in_by_a_resume() -> None:
    async with (
        stage(max_queued_requests=0) as running,
        AsyncClient(running.address) as client,
    ):
        for _ in range(2):
            with pytest.raises(OverloadedError, match="max_queued_requests=0"):
                await client.generate("x", request_id="r", sampling=SAMPLING, resume_timeout_s=0)
            await running.server._journals.flush()
            with pytest.raises(OverloadedError, match="max_queued_requests=0"):
                _ = [e async for e in client.resume("r", resume_timeout_s=0)]
        await _is_quiet(running)


async def _is_quiet(running: Stage) -> None:
    """Return once nothing is left of any request."""
    await eventually(lambda: running.server.num_inflight == 0)
    assert not running.server._running
    assert running.dispatcher.num_queued == 0
    assert running.server._hand_overs.num_moving == 0
