"""Requests before a dispatcher that decides what the test says."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from gateway_fakes import eventually
from prometheus_client import CollectorRegistry

from cluster.errors import DeadlineError, OverloadedError, UnavailableError
from cluster.gateway.waiting import WaitingRoom, _is_news
from cluster.metrics import Metrics
from cluster.router.route import Candidate, Decision, Outcome, OutcomeKind, RouteRequest
from cluster.types import ServiceClass

DECISION = Decision((Candidate("r-1", 0.0, 0, 1),), 1, 0, True)
DISPATCHED = Outcome(OutcomeKind.DISPATCHED, decision=DECISION)
QUEUED = Outcome(OutcomeKind.QUEUED, position=3, estimate_s=1.5)


class FakeDispatcher:
    """Gives every request `first`; what is queued leaves with what `leaving` says."""

    def __init__(self) -> None:
        self.first = QUEUED
        self.leaving: dict[str, Outcome] = {}
        self.places: dict[str, Outcome] = {}
        self.queued: dict[str, RouteRequest] = {}
        self.ended: list[str] = []
        self.due_s = math.inf
        self.num_polls = 0
        self.fails = False

    def submit(self, request: RouteRequest, now_s: float) -> Outcome:
        if self.first.kind is OutcomeKind.QUEUED:
            self.queued[request.request_id] = request
        return self.first

    def poll(self, now_s: float) -> list[tuple[RouteRequest, Outcome]]:
        self.num_polls += 1
        if self.fails:
            raise RuntimeError("a bug")
        ready = [request_id for request_id in self.queued if request_id in self.leaving]
        return [(self.queued.pop(name), self.leaving.pop(name)) for name in ready]

    def next_poll_s(self) -> float:
        return self.due_s

    def place(self, request_id: str, now_s: float) -> Outcome | None:
        del now_s
        return self.places.get(request_id)

    def on_end(self, request_id: str) -> None:
        self.queued.pop(request_id, None)
        self.ended.append(request_id)


class Scene:
    """A waiting room that polls by itself only every hour, and what its requests are told."""

    def __init__(self, *, load_interval_s: float = 3600.0, queue_timeout_s: float = 60.0) -> None:
        self.dispatcher: Any = FakeDispatcher()
        self.registry = CollectorRegistry()
        self.room = WaitingRoom(
            self.dispatcher,
            Metrics(self.registry),
            queue_timeout_s=queue_timeout_s,
            load_interval_s=load_interval_s,
        )
        self.told: list[int] = []

    async def tell(self, outcome: Outcome) -> None:
        self.told.append(outcome.position)

    def place(self, request_id: str = "a", *, expires_s: float = math.inf) -> asyncio.Task[Outcome]:
        request = RouteRequest(
            *(request_id, 10, lambda *kind: [], 0.0),
            service_class=ServiceClass.BATCH,
            expires_s=expires_s,
        )
        return asyncio.create_task(self.room.place(request, self.tell))

    async def queued(self, request_id: str = "a", **options: float) -> asyncio.Task[Outcome]:
        """Return the task of a request that waits, after the poll that its coming has caused."""
        num_polls = self.dispatcher.num_polls
        task = self.place(request_id, **options)
        await eventually(lambda: self.dispatcher.num_polls > num_polls)
        assert not task.done()
        return task

    def count(self, outcome: str) -> float:
        labels = {"outcome": outcome, "service_class": "batch"}
        return self.registry.get_sample_value("sluice_admission_total", labels) or 0.0


MakeScene = Callable[..., Awaitable[Scene]]


@pytest.fixture
async def make() -> AsyncIterator[MakeScene]:
    scenes = []

    async def make_scene(**options: float) -> Scene:
        scenes.append(Scene(**options))
        scenes[-1].room.start()
        return scenes[-1]

    yield make_scene
    for scene in scenes:
        await scene.room.stop()


async def test_dispatched_request_does_not_wait(make: MakeScene) -> None:
    scene = await make()
    scene.dispatcher.first = DISPATCHED
    assert await scene.place() is DISPATCHED
    scene.room.end("a")
    await asyncio.sleep(0)  # the room would poll now
    assert scene.told == []
    assert scene.dispatcher.num_polls == 0
    assert scene.count("dispatched") == 1
    assert scene.registry.get_sample_value("sluice_queue_seconds_count") == 0


async def test_queued_request_is_told_its_place_and_leaves_by_the_next_poll(
    make: MakeScene,
) -> None:
    scene = await make()
    task, other = await scene.queued(), await scene.queued("b")
    assert scene.told == [3, 3]
    scene.dispatcher.leaving["a"] = DISPATCHED
    assert not task.done()
    scene.room.poke()
    assert await task is DISPATCHED
    assert not other.done()
    assert (scene.count("queued"), scene.count("dispatched")) == (2, 1)
    assert scene.registry.get_sample_value("sluice_queue_seconds_count") == 1
    other.cancel()


async def test_end_of_a_request_makes_room_for_another(make: MakeScene) -> None:
    scene = await make()
    task = await scene.queued()
    scene.dispatcher.leaving["a"] = DISPATCHED
    scene.room.end("another")
    assert await task is DISPATCHED
    assert scene.dispatcher.ended == ["another"]


async def test_queue_is_polled_as_often_as_replicas_report(make: MakeScene) -> None:
    scene = await make(load_interval_s=0.02)
    task = await scene.queued()
    scene.dispatcher.leaving["a"] = DISPATCHED
    assert await asyncio.wait_for(task, 5.0) is DISPATCHED


async def test_queue_is_polled_when_a_time_is_over(make: MakeScene) -> None:
    scene = await make()
    scene.dispatcher.due_s = time.monotonic() + 0.05
    task = await scene.queued()
    scene.dispatcher.leaving["a"] = Outcome(OutcomeKind.EXPIRED, "late")
    with pytest.raises(UnavailableError, match="late"):
        await asyncio.wait_for(task, 5.0)
    assert scene.count("expired") == 1


@pytest.mark.parametrize(
    ("told", "position", "is_news"),
    [
        *((100, 99, False), (100, 90, False), (100, 89, True), (100, 111, True)),
        *((9, 8, True), (1, 0, True), (0, 0, False), (0, 1, True)),
    ],
)
def test_place_is_news_beyond_a_tenth(told: int, position: int, is_news: bool) -> None:
    assert _is_news(told, position) is is_news


async def test_place_is_told_again_where_it_is_news(
    make: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.waiting._TELL_INTERVAL_S", 0.001)
    scene = await make()
    task = await scene.queued()
    for position in (1, 0):
        scene.dispatcher.places["a"] = Outcome(OutcomeKind.QUEUED, position=position)
        await eventually(lambda position=position: scene.told[-1] == position)
    assert scene.told == [3, 1, 0]
    task.cancel()


async def test_refusals_have_reasons_that_programs_can_tell_apart(make: MakeScene) -> None:
    scene = await make()
    full = Outcome(OutcomeKind.REFUSED, "the queue is full", retry_after_s=4.0)
    scene.dispatcher.first = full
    with pytest.raises(OverloadedError, match="the queue is full") as caught:
        await scene.place()
    assert (caught.value.reason, caught.value.retry_after_s) == ("QUEUE_FULL", 4.0)
    scene.dispatcher.first = Outcome(OutcomeKind.REFUSED, "too late", decision=DECISION)
    with pytest.raises(OverloadedError, match="too late") as caught:
        await scene.place()
    assert caught.value.reason == "SLO_NOT_ATTAINABLE"
    assert scene.count("refused") == 2


async def test_expired_request_says_whose_time_was_over(make: MakeScene) -> None:
    scene = await make()
    scene.dispatcher.first = Outcome(OutcomeKind.EXPIRED, "over")
    with pytest.raises(DeadlineError, match="over"):
        await scene.place(expires_s=time.monotonic() - 1.0)
    with pytest.raises(UnavailableError, match="over"):
        await scene.place(expires_s=time.monotonic() + 60.0)


async def test_cancelled_request_waits_no_more(make: MakeScene) -> None:
    scene = await make()
    task = await scene.queued()
    task.cancel()
    await asyncio.wait([task])
    again = await scene.queued("b")
    # The poll and the cancelling may cross.
    scene.dispatcher.leaving |= {"a": DISPATCHED, "b": DISPATCHED}
    scene.room.poke()
    assert await again is DISPATCHED


async def test_failed_poll_is_logged_and_tried_again(
    make: MakeScene, caplog: pytest.LogCaptureFixture
) -> None:
    scene = await make(load_interval_s=0.02)
    scene.dispatcher.fails = True
    task = await scene.queued()
    scene.dispatcher.fails = False
    scene.dispatcher.leaving["a"] = DISPATCHED
    assert await asyncio.wait_for(task, 5.0) is DISPATCHED
    assert "a bug" in caplog.text


async def test_request_gives_up_where_nobody_polls(
    make: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.waiting._TELL_INTERVAL_S", 0.01)
    monkeypatch.setattr("cluster.gateway.waiting._GRACE_S", 0.05)
    scene = await make(queue_timeout_s=0.05)
    with pytest.raises(UnavailableError, match="looked after"):
        await asyncio.wait_for(scene.place(), 5.0)


async def test_stopped_room_ends_what_waits_and_takes_nothing_more(make: MakeScene) -> None:
    scene = await make()
    task = await scene.queued()
    await scene.room.stop()
    with pytest.raises(UnavailableError, match="shutting down"):
        await task
    with pytest.raises(UnavailableError, match="shutting down"):
        await scene.place("b")
