"""Rate limits of tenants on a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid
from typing import Any

import pytest
from limit_fakes import START_S, admit, caller, served
from redis_server import RedisServer

from cluster.clock import VirtualClock
from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.gateway import rate_limiter
from cluster.gateway.live_streams import PERIOD_S
from cluster.gateway.rate_limiter import RateLimiter
from cluster.kvstore.open import open_store
from cluster.kvstore.store import Store

pytestmark = pytest.mark.integration


def _open(server: RedisServer, namespace: str) -> Store:
    return open_store(StoreConfig(url=server.url, namespace=namespace, timeout_s=30.0))


@pytest.mark.parametrize(
    "limits", [{"requests_per_minute": 20}, {"tokens_per_minute": 415}, {"max_streams": 20}]
)
async def test_limiter_of_two_gateways_is_exact_on_redis(
    redis_server: RedisServer, limits: dict[str, int]
) -> None:
    namespace = f"limits-{uuid.uuid4().hex}"
    stores = [_open(redis_server, namespace) for _ in range(2)]
    # A minute and a period that do not end during the test.
    limiters = [RateLimiter(s, on_error="closed", now_s=lambda: START_S) for s in stores]
    async with contextlib.AsyncExitStack() as stack:
        entered = await asyncio.gather(
            *(
                stack.enter_async_context(admit(limiter, caller(**limits)))
                for _ in range(30)
                for limiter in limiters
            ),
            return_exceptions=True,
        )
        assert sum(outcome is None for outcome in entered) == 20
    for limiter, store in zip(limiters, stores, strict=True):
        await limiter.close()
        await store.close()


async def test_limiter_carries_streams_on_by_itself(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_limiter, "PERIOD_S", 0.02)  # how often it carries, not how far
    store = _open(redis_server, f"limits-{uuid.uuid4().hex}")
    clock = VirtualClock(START_S)
    one, other = (RateLimiter(store, on_error="closed", now_s=clock.now) for _ in range(2))
    who = caller(max_streams=1)

    async def is_carried() -> bool:
        key = f"streams:alice:{int(clock.now() // PERIOD_S) + 1}"
        return await store.count(key, 0, 1.0) == 1

    async with admit(one, who):
        for _ in range(4):
            assert not await served(other, who)
            give_up_s = time.monotonic() + 30.0
            while not await is_carried():
                assert time.monotonic() < give_up_s
                await asyncio.sleep(0.01)
            clock.advance(PERIOD_S)
    await one.close()
    assert await served(other, who)
    await other.close()
    await store.close()


@pytest.mark.parametrize("on_error", ["open", "closed"])
async def test_limiter_redis_that_dies_costs_a_deadline_at_the_most(
    redis_server: RedisServer, on_error: Any
) -> None:
    with RedisServer() as server:
        store = open_store(StoreConfig(url=server.url, timeout_s=0.5))
        limiter = RateLimiter(store, on_error=on_error)
        who = caller(requests_per_minute=1000, tokens_per_minute=10_000, max_streams=9)
        assert await served(limiter, who)
        for lose in (lambda: os.kill(server.pid, signal.SIGSTOP), server.kill):
            lose()
            for _ in range(5):
                start_s = time.monotonic()
                if on_error == "open":
                    assert await served(limiter, who)
                else:
                    with pytest.raises(UnavailableError, match="rate_limit_on_error=closed"):
                        await served(limiter, who)
                assert time.monotonic() - start_s < 3.0
        await limiter.close()
        await store.close()
