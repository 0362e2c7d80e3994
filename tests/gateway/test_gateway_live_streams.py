"""Streams counted by several gateways, which may die."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limit_fakes import START_S, JitteryStore

from cluster.clock import VirtualClock
from cluster.errors import UnavailableError
from cluster.gateway.live_streams import PERIOD_S, LiveStreams


class Scene:
    """Gateways on one store; what they do beside their calls is done when it is asked for."""

    def __init__(self, num_gateways: int, seed: int = 7) -> None:
        self.clock = VirtualClock(START_S)
        self.store = JitteryStore(self.clock, seed)
        self._tasks: list[asyncio.Task[None]] = []
        self.gateways = [
            LiveStreams(self.store, self.clock.now, self._spawn) for _ in range(num_gateways)
        ]

    def _spawn(self, call: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(call))

    async def settle(self) -> list[BaseException | None]:
        tasks, self._tasks = self._tasks, []
        return await asyncio.gather(*tasks, return_exceptions=True)

    async def next_period(self, *alive: LiveStreams) -> None:
        await self.settle()
        self.clock.advance(PERIOD_S)
        for gateway in alive:
            await gateway.carry()

    async def num_free(self, limit: int) -> int:
        """Return how many more may start, as a gateway sees it that has none."""
        other = LiveStreams(self.store, self.clock.now, self._spawn)
        count = 0
        while await other.start("a", limit):
            count += 1
        for _ in range(count):
            other.end("a")
        await self.settle()
        return count


async def test_streams_of_all_gateways_are_within_one_limit() -> None:
    scene = Scene(2)
    one, other = scene.gateways
    starts = await asyncio.gather(
        *(gateway.start("a", 10) for _ in range(15) for gateway in (one, other))
    )
    assert sum(starts) == 10
    assert await one.start("b", 1)
    (one if starts[0] else other).end("a")
    await scene.settle()
    assert await other.start("a", 10)
    assert not await one.start("a", 10)


async def test_streams_that_last_are_counted_in_every_period() -> None:
    scene = Scene(2)
    one, other = scene.gateways
    for _ in range(3):
        assert await one.start("a", 5)
    for _ in range(7):
        await scene.next_period(one, other)
        assert await scene.num_free(5) == 2
    one.end("a")
    await scene.settle()
    assert await scene.num_free(5) == 3
    await scene.next_period(one, other)
    assert await scene.num_free(5) == 3


async def test_streams_of_a_dead_gateway_are_gone_after_two_periods() -> None:
    scene = Scene(2)
    dead, alive = scene.gateways
    for gateway in (dead, dead, alive):
        assert await gateway.start("a", 3)
    await scene.next_period(alive)
    assert await scene.num_free(3) == 0
    await scene.next_period(alive)
    assert await scene.num_free(3) == 2


async def test_streams_left_wrong_by_a_lost_call_are_right_after_two_periods() -> None:
    scene = Scene(1)
    (gateway,) = scene.gateways
    for _ in range(2):
        assert await gateway.start("a", 3)
    await scene.settle()
    scene.store.is_up = False
    gateway.end("a")
    assert any(isinstance(error, UnavailableError) for error in await scene.settle())
    with pytest.raises(UnavailableError):
        await gateway.start("a", 3)
    scene.store.is_up = True
    assert await scene.num_free(3) == 1
    await scene.next_period(gateway)
    await scene.next_period(gateway)
    assert await scene.num_free(3) == 2


async def test_streams_missed_for_several_periods_are_counted_again() -> None:
    scene = Scene(1)
    (gateway,) = scene.gateways
    assert await gateway.start("a", 2)
    await scene.settle()
    scene.clock.advance(50 * PERIOD_S)  # it was stopped
    assert await gateway.start("a", 2)
    assert not await gateway.start("a", 2)
    for _ in range(2):
        gateway.end("a")
    await scene.settle()
    assert scene.store.sums() == {}
    assert gateway.is_idle


async def test_streams_are_forgotten_with_their_last_one() -> None:
    scene = Scene(1)
    (gateway,) = scene.gateways
    for tenant in ("a", "b"):
        assert await gateway.start(tenant, 1)
    assert not await gateway.start("b", 1)
    gateway.end("a")
    await scene.next_period(gateway)
    assert list(gateway._last_period) == list(gateway._num_live) == ["b"]


@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(
        st.tuples(st.sampled_from(["start", "end", "carry", "period"]), st.integers(0, 1)),
        max_size=40,
    ),
)
def test_streams_never_exceed_the_limit_nor_leave_anything(seed, history) -> None:
    """Random histories, many calls at once; every gateway carries once in a period."""

    async def play() -> None:
        scene = Scene(2, seed)
        live = [0, 0]
        calls: list[asyncio.Task[None]] = []

        async def start(which: int) -> None:
            if await scene.gateways[which].start("a", 4):
                live[which] += 1
                assert sum(live) <= 4

        for step, which in history:
            if step == "start":
                calls.append(asyncio.create_task(start(which)))
            elif step == "end" and live[which]:
                live[which] -= 1
                scene.gateways[which].end("a")
            elif step == "carry":
                await scene.gateways[which].carry()
            elif step == "period":
                await asyncio.gather(*calls)
                for gateway in scene.gateways:
                    await gateway.carry()
                await scene.next_period()
        await asyncio.gather(*calls)
        assert sum(live) <= 4
        await scene.settle()
        assert await scene.num_free(4) == 4 - sum(live)
        for which, gateway in enumerate(scene.gateways):
            for _ in range(live[which]):
                gateway.end("a")
        await scene.settle()
        assert await scene.num_free(4) == 4

    asyncio.run(play())
