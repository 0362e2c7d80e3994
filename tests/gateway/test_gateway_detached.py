"""Requests that outlive their calls: hand-off, time, end."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable

import pytest

from cluster.config import GatewayConfig
from cluster.errors import InvalidArgumentError, PoisonError, SluiceError
from cluster.gateway.detached import DetachedRequests, check_detach, counted_from_now
from cluster.rpc.sluice.v1.inference_pb2 import GenerateStreamResponse

LONG_S = 600.0


def event(seq: int) -> GenerateStreamResponse:
    return GenerateStreamResponse(request_id="r", seq=seq)


class Work:
    """A request of `num_events`; each waits for `may_go`."""

    def __init__(self, num_events: int = 3, error: Exception | None = None) -> None:
        self.num_events = num_events
        self.error = error
        self.num_sent = 0
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.is_cancelled = False

    async def __call__(self, send: Callable[[GenerateStreamResponse], Awaitable[None]]) -> None:
        try:
            for seq in range(self.num_events):
                await self.may_go.wait()
                await send(event(seq))
                self.num_sent += 1
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        if self.error is not None:
            raise self.error


class Client:
    """Takes events for as long as it is there."""

    def __init__(self, num_taken: int = 1000) -> None:
        self.seqs: list[int] = []
        self.num_left = num_taken
        self.has_blocked = asyncio.Event()

    async def __call__(self, message: GenerateStreamResponse) -> None:
        if not self.num_left:
            self.has_blocked.set()
            await asyncio.Event().wait()  # it reads no more
        self.num_left -= 1
        self.seqs.append(message.seq)


async def turns(number: int = 20) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def cancelled(call: asyncio.Task[None]) -> None:
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


@pytest.mark.parametrize("detach_s", [-0.1, 600.1, math.inf, -math.inf, math.nan])
def test_detach_out_of_bounds_is_refused_by_the_name_of_knob_and_field(detach_s: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"gateway\.max_detach_s=600") as refused:
        check_detach(detach_s, GatewayConfig())
    assert refused.value.field == "detach_on_disconnect_s"
    assert f"detach_on_disconnect_s={detach_s:g}" in str(refused.value)


@pytest.mark.parametrize("detach_s", [0.0, 0.5, 600.0])
def test_detach_within_its_bounds_is_taken(detach_s: float) -> None:
    check_detach(detach_s, GatewayConfig())


def test_deadline_is_counted_on_without_its_call() -> None:
    assert counted_from_now(None)() is None
    remaining_s = counted_from_now(10.0)()
    assert remaining_s is not None and 9.0 < remaining_s <= 10.0


async def test_client_that_stays_gets_every_event_and_the_end() -> None:
    requests, client = DetachedRequests(), Client()
    await requests.serve(Work(50), client, LONG_S, "r")
    assert client.seqs == list(range(50))
    assert requests.num_live == 0


async def test_client_that_stays_is_told_how_the_request_failed_after_its_events() -> None:
    requests, client = DetachedRequests(), Client()
    with pytest.raises(PoisonError, match="two replicas"):
        await requests.serve(Work(2, PoisonError("two replicas")), client, LONG_S, "r")
    assert client.seqs == [0, 1]


async def test_request_is_two_events_ahead_of_a_client_that_does_not_read() -> None:
    requests, client, work = DetachedRequests(), Client(num_taken=2), Work(50)
    call = asyncio.create_task(requests.serve(work, client, LONG_S, "r"))
    await client.has_blocked.wait()
    await turns()
    assert client.seqs == [0, 1]
    assert work.num_sent == 3  # the third is being written
    await cancelled(call)
    await turns(100)
    assert work.num_sent == 50 and not work.is_cancelled, "without a client it goes on"
    assert requests.num_live == 0


async def test_request_goes_on_without_its_client_and_ends_by_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests, client, work = DetachedRequests(), Client(), Work()
    work.may_go.clear()
    call = asyncio.create_task(requests.serve(work, client, LONG_S, "r"))
    await turns()
    with caplog.at_level(logging.INFO, logger="cluster.gateway.detached"):
        await cancelled(call)
        assert requests.num_live == 1
        work.may_go.set()
        await turns()
    assert (work.num_sent, client.seqs, requests.num_live) == (3, [], 0)
    assert "goes on for 600 s without its client" in caplog.text
    assert "ended without its client: finished" in caplog.text


async def test_client_whose_connection_fails_counts_as_gone() -> None:
    class Lost(Client):
        async def __call__(self, message: GenerateStreamResponse) -> None:
            raise ConnectionError

    requests, work = DetachedRequests(), Work()
    with pytest.raises(ConnectionError):
        await requests.serve(work, Lost(), LONG_S, "r")
    await turns()
    assert work.num_sent == 3 and requests.num_live == 0


async def test_request_is_cancelled_when_nobody_came_back_in_time() -> None:
    requests, work = DetachedRequests(), Work()
    work.may_go.clear()
    call = asyncio.create_task(requests.serve(work, Client(), 0.001, "r"))
    await turns()
    assert not work.is_cancelled, "its time begins when the client goes"
    await cancelled(call)
    (task,) = requests._tasks
    await asyncio.wait([task], timeout=5.0)
    await turns()
    assert work.is_cancelled and requests.num_live == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [(SluiceError("no"), "without its client: INTERNAL"), (ValueError("bug"), "ValueError: bug")],
)
async def test_failure_that_nobody_is_told_is_logged(
    caplog: pytest.LogCaptureFixture, error: Exception, said: str
) -> None:
    requests, work = DetachedRequests(), Work(1, error)
    work.may_go.clear()
    call = asyncio.create_task(requests.serve(work, Client(), LONG_S, "r"))
    await turns()
    with caplog.at_level(logging.INFO, logger="cluster.gateway.detached"):
        await cancelled(call)
        work.may_go.set()
        await turns()
    assert said in caplog.text


async def test_stop_ends_those_with_and_without_a_client() -> None:
    requests, works = DetachedRequests(), [Work(), Work()]
    for work in works:
        work.may_go.clear()
    calls = [asyncio.create_task(requests.serve(w, Client(), LONG_S, "r")) for w in works]
    await turns()
    await cancelled(calls[0])
    await requests.stop()
    assert [work.is_cancelled for work in works] == [True, True]
    with pytest.raises(asyncio.CancelledError):
        await calls[1]
    assert requests.num_live == 0
    await requests.stop()
