"""Rate limits of tenants over several gateways, and what becomes of them without a store."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from limit_fakes import START_S, JitteryStore, admit, caller, served

from cluster.clock import VirtualClock
from cluster.errors import (
    DeadlineError,
    InvalidArgumentError,
    OverloadedError,
    SupersededError,
    UnavailableError,
)
from cluster.gateway.identity import Caller
from cluster.gateway.rate_limiter import RateLimiter


class Scene:
    """Gateways on one store."""

    def __init__(self, num_gateways: int = 1, on_error: Any = "open") -> None:
        self.clock = VirtualClock(START_S)
        self.store = JitteryStore(self.clock)
        self.limiters = [
            RateLimiter(self.store, on_error=on_error, now_s=self.clock.now)
            for _ in range(num_gateways)
        ]

    async def settle(self) -> None:
        """Return when everything is given back that is to be."""
        for limiter in self.limiters:
            await limiter.close()


@contextlib.asynccontextmanager
async def scene(num_gateways: int = 1, on_error: Any = "open") -> AsyncIterator[Scene]:
    opened = Scene(num_gateways, on_error)
    yield opened
    await opened.settle()


async def test_limiter_without_limits_asks_no_store() -> None:
    async with scene() as here:
        for who in (Caller(), caller()):
            assert await served(here.limiters[0], who)
        assert here.store.num_calls == 0


async def test_limiter_refuses_by_name_and_says_when_to_come_again() -> None:
    async with scene() as here:
        (limiter,) = here.limiters
        who = caller(requests_per_minute=3)
        here.clock.advance(15.0)
        assert [await served(limiter, who) for _ in range(3)] == [True] * 3
        with pytest.raises(OverloadedError) as refused:
            await admit(limiter, who).__aenter__()
        assert "tenant alice has had 3 " in str(refused.value)
        assert "needs 1, requests_per_minute=3: try again in 65.01 s" in str(refused.value)
        assert refused.value.reason == "RATE_LIMITED"
        assert refused.value.retry_after_s == 65.01  # until one of three has faded
        assert await served(limiter, caller("bob", requests_per_minute=3))
        here.clock.advance(64.9)
        assert not await served(limiter, who)
        here.clock.advance(0.11)
        assert await served(limiter, who)
        assert not await served(limiter, who)


async def test_limiter_counts_what_an_answer_became_once_it_has_ended() -> None:
    async with scene() as here:
        (limiter,) = here.limiters
        who = caller(tokens_per_minute=100)
        async with admit(limiter, who, prompt=20, most=60, became=5):
            assert not await served(limiter, who, prompt=11, most=10)
            assert await served(limiter, who, prompt=10, most=10, became=10)
        await here.settle()
        assert list(here.store.sums().values()) == [45]
        assert await served(limiter, who, prompt=5, most=50, became=50)
        assert not await served(limiter, who, prompt=1, most=0)


async def test_limiter_gives_back_into_the_minute_of_the_arrival() -> None:
    async with scene() as here:
        (limiter,) = here.limiters
        who = caller(tokens_per_minute=100)
        async with admit(limiter, who, prompt=20, most=80, became=0):
            here.clock.advance(60.0)
        await here.settle()
        assert await served(limiter, who, prompt=80, most=0)  # 20 of the minute before
        assert not await served(limiter, who, prompt=1, most=0)
        async with admit(limiter, caller("bob", tokens_per_minute=9), prompt=1, most=8, became=0):
            here.clock.advance(120.0)  # nobody reads that minute any more
            await here.settle()
            num_calls = here.store.num_calls
        await here.settle()
        assert here.store.num_calls == num_calls


@pytest.mark.parametrize(
    ("error", "became", "expected"),
    [
        (OverloadedError("full"), 0, 0),  # refused after all: nothing was computed
        (UnavailableError("gone"), 0, 0),
        (UnavailableError("gone"), 7, 27),
        (DeadlineError("late"), 0, 20),
        (asyncio.CancelledError(), 3, 23),
    ],
)
async def test_limiter_counts_of_a_request_that_failed_what_was_computed(
    error: BaseException, became: int, expected: int
) -> None:
    async with scene() as here:
        who = caller(tokens_per_minute=100, requests_per_minute=9)
        with pytest.raises(type(error)):
            async with admit(here.limiters[0], who, prompt=20, most=60, became=became):
                raise error
        await here.settle()
        sums = here.store.sums()
        assert sum(sums.values()) == 1 + expected  # the request itself is counted
        assert len(sums) == 1 + bool(expected)


async def test_limiter_refusal_takes_nothing_of_the_other_limits() -> None:
    async with scene() as here:
        (limiter,) = here.limiters
        who = caller(tokens_per_minute=25, requests_per_minute=2, max_streams=2)
        async with admit(limiter, who):
            for _ in range(5):
                assert not await served(limiter, who)
                await here.settle()
            assert sorted(here.store.sums().values()) == [1, 1, 1, 20]
        await here.settle()
        assert sorted(here.store.sums().values()) == [1, 20]


async def test_limiter_refuses_for_good_what_no_minute_has_room_for() -> None:
    async with scene() as here:
        with pytest.raises(
            InvalidArgumentError, match=r"max_tokens=91, tokens_per_minute=100"
        ) as e:
            await admit(here.limiters[0], caller(tokens_per_minute=100), most=91).__aenter__()
        assert e.value.field == "sampling.max_tokens"
        assert here.store.num_calls == 0


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"requests_per_minute": 17}, 17),
        ({"tokens_per_minute": 355}, 17),
        ({"max_streams": 17}, 17),
        ({"requests_per_minute": 17, "tokens_per_minute": 400, "max_streams": 30}, 17),
    ],
)
async def test_limiter_of_two_gateways_lets_exactly_the_limit_in(
    limits: dict[str, int], expected: int
) -> None:
    async with scene(2) as here, contextlib.AsyncExitStack() as stack:
        attempts = [
            admit(limiter, caller(**limits)) for _ in range(30) for limiter in here.limiters
        ]
        entered = await asyncio.gather(
            *(stack.enter_async_context(attempt) for attempt in attempts), return_exceptions=True
        )
        assert sum(outcome is None for outcome in entered) == expected
        errors = [outcome for outcome in entered if outcome is not None]
        assert all(isinstance(e, OverloadedError) and e.reason == "RATE_LIMITED" for e in errors)


async def test_limiter_stream_that_ends_makes_room_at_another_gateway() -> None:
    async with scene(2) as here:
        one, other = here.limiters
        who = caller(max_streams=1)
        async with admit(one, who):
            with pytest.raises(OverloadedError, match=r"tenant alice .* max_streams=1"):
                await admit(other, who).__aenter__()
        await here.settle()
        assert await served(other, who)


async def test_limiter_client_that_goes_while_it_waits_leaves_nothing() -> None:
    async with scene() as here:
        (limiter,) = here.limiters
        who = caller(tokens_per_minute=100, requests_per_minute=5, max_streams=5)
        for num_turns in range(40):
            attempt = asyncio.create_task(served(limiter, who))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            attempt.cancel()
            await asyncio.wait([attempt])
            await here.settle()
            here.clock.advance(180.0)
            assert limiter._streams.is_idle
        here.store.may_answer.clear()
        attempt = asyncio.create_task(served(limiter, who))
        await asyncio.sleep(0)
        attempt.cancel()
        await asyncio.wait([attempt])
        here.store.may_answer.set()
        await here.settle()
        assert here.store.sums() == {}


async def test_limiter_that_fails_open_passes_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with scene() as here:
        (limiter,) = here.limiters
        who = caller(requests_per_minute=1, tokens_per_minute=1000, max_streams=1)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                here.store.is_up = False
                for _ in range(5):
                    assert await served(limiter, who)
                    assert await served(limiter, caller("without limits"))
                here.store.is_up = True
                here.clock.advance(180.0)
                assert await served(limiter, who)
                await here.settle()
                assert not await served(limiter, who)
                here.clock.advance(180.0)
        warnings = [r for r in caplog.records if "rate limits fail open" in r.getMessage()]
        assert len(warnings) == 2
        await here.settle()
        assert limiter._streams.is_idle


async def test_limiter_that_fails_closed_refuses_by_the_name_of_the_knob() -> None:
    async with scene(on_error="closed") as here:
        (limiter,) = here.limiters
        who = caller(requests_per_minute=5)
        here.store.is_up = False
        with pytest.raises(UnavailableError, match=r"gateway\.rate_limit_on_error=closed"):
            await admit(limiter, who).__aenter__()
        assert await served(limiter, caller("bob"))
        here.store.is_up = True
        assert await served(limiter, who)


async def test_limiter_refuses_what_it_knows_to_be_too_much_though_it_fails_open() -> None:
    class HalfStore(JitteryStore):
        async def count(self, key: str, *args: Any, **options: Any) -> int:
            if "tokens" in key:
                raise UnavailableError("out of reach")
            return await super().count(key, *args, **options)

    limiter = RateLimiter(HalfStore(VirtualClock(START_S)), on_error="open", now_s=lambda: START_S)
    who = caller(requests_per_minute=1, tokens_per_minute=1000)
    assert await served(limiter, who)
    assert not await served(limiter, who)
    await limiter.close()


async def test_limiter_counts_what_goes_on_elsewhere_but_refuses_none_of_it() -> None:
    async with scene(2) as here:
        one, other = here.limiters
        who = caller(requests_per_minute=1, tokens_per_minute=50, max_streams=1)
        async with admit(one, who, prompt=20, most=30, became=5):
            async with other.readmit(who, 40, lambda: 7):
                await here.settle()
                assert sorted(here.store.sums().values()) == [1, 2, 2, 90]  # two periods
            await here.settle()
            assert sorted(here.store.sums().values()) == [1, 1, 1, 57]
        await here.settle()
        assert sorted(here.store.sums().values()) == [1, 32]
        assert other._streams.is_idle


@pytest.mark.parametrize("error", [SupersededError("elsewhere"), asyncio.CancelledError()])
async def test_limiter_counts_what_the_answer_got_before_it_goes_on_again(
    error: BaseException,
) -> None:
    async with scene() as here:
        who = caller(tokens_per_minute=100)
        with pytest.raises(type(error)):
            async with here.limiters[0].readmit(who, 60, lambda: 9):
                raise error
        await here.settle()
        assert list(here.store.sums().values()) == [9]


@pytest.mark.parametrize("on_error", ["open", "closed"])
async def test_limiter_lets_go_on_what_it_cannot_count(on_error: str) -> None:
    async with scene(on_error=on_error) as here:
        (limiter,) = here.limiters
        here.store.is_up = False
        who = caller(tokens_per_minute=10, max_streams=1)
        async with limiter.readmit(who, 60, lambda: 9):
            pass
        here.store.is_up = True
        await here.settle()
        assert here.store.sums() == {}


async def test_limiter_without_limits_asks_no_store_about_what_goes_on() -> None:
    async with scene() as here:
        async with here.limiters[0].readmit(caller(), 60, lambda: 9):
            pass
        assert here.store.num_calls == 0
