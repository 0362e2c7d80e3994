"""Callers with limits, and a store that lets others in between and can be lost."""

from __future__ import annotations

import asyncio
import random
from contextlib import AbstractAsyncContextManager

from cluster.clock import VirtualClock
from cluster.config import StoreConfig
from cluster.errors import OverloadedError, UnavailableError
from cluster.gateway.identity import Caller
from cluster.gateway.rate_limit import RateLimits
from cluster.gateway.rate_limiter import RateLimiter
from cluster.kvstore.embedded import EmbeddedStore

START_S = 1_700_000_040.0  # seconds since 1970: a minute begins


class JitteryStore(EmbeddedStore):
    """An embedded store whose answers take a random number of turns of the loop."""

    def __init__(self, clock: VirtualClock, seed: int = 7) -> None:
        super().__init__(StoreConfig(), clock)
        self._chance = random.Random(seed)
        self.is_up = True
        self.num_calls = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def count(
        self, key: str, amount: int, ttl_s: float, *, at_most: int | None = None
    ) -> int:
        self.num_calls += 1
        await self._take_turns()
        await self.may_answer.wait()
        if not self.is_up:
            raise UnavailableError("out of reach")
        total = await super().count(key, amount, ttl_s, at_most=at_most)
        await self._take_turns()
        return total

    def sums(self) -> dict[str, int]:
        """Return the counters that are not 0 now."""
        live = {key: self._live_counter(key) for key in list(self._counters)}
        return {key: counted for key, counted in live.items() if counted}

    async def _take_turns(self) -> None:
        for _ in range(self._chance.randrange(5)):
            await asyncio.sleep(0)


def caller(tenant: str = "alice", **limits: int) -> Caller:
    return Caller(tenant, tenant.encode(), False, limits=RateLimits(**limits))


def admit(
    limiter: RateLimiter, who: Caller, *, prompt: int = 10, most: int = 10, became: int = 10
) -> AbstractAsyncContextManager[None]:
    return limiter.admit(who, prompt, most, lambda: became)


async def served(limiter: RateLimiter, who: Caller, **tokens: int) -> bool:
    """Serve one request from beginning to end, if it is let in."""
    try:
        async with admit(limiter, who, **tokens):
            return True
    except OverloadedError as error:
        assert error.reason == "RATE_LIMITED"
        return False
