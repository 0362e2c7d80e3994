"""Rate limits of tenants, kept by all gateways together: counted in the store.

    admit ──► requests, tokens: previous + present minute ──► within limits ──► runs ──► end
                streams: present + next period                       └──► refused     │
                    ▲                                                        │        │
                    └────────────── what was not used is given back ◄────────┴────────┘

Tokens are reserved for the longest answer that was asked for. A tenant without limits costs no call
of the store. What is given back waits for nobody; lost, it counts until its minute has passed.
A request that goes on in another call was let in before: it is counted, but never refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.errors import InvalidArgumentError, OverloadedError, SluiceError, UnavailableError
from cluster.gateway.identity import Caller
from cluster.gateway.live_streams import PERIOD_S, LiveStreams
from cluster.gateway.rate_limit import NO_LIMITS, WINDOW_S, RateLimits, Window
from cluster.kvstore.store import Store

logger = logging.getLogger(__name__)

RATE_LIMITED = "RATE_LIMITED"
"""Reason of refusals, for clients."""

RESUMED_FACTOR = 2
"""Times `max_streams` that a tenant may have where requests go on in another call."""

_REQUESTS, _TOKENS = "requests_per_minute", "tokens_per_minute"
_TTL_S = 3 * WINDOW_S  # a minute's count is read until the next one has passed


@dataclass(slots=True)
class _Hold:
    """What one request has counted."""

    tenant: str
    arrived_s: float  # since 1970
    counted: list[str] = field(default_factory=list)  # names of limits
    is_live: bool = False  # counted as a stream

    @property
    def minute(self) -> int:
        return int(self.arrived_s // WINDOW_S)


class RateLimiter:
    """Admits requests of one gateway.

    Args:
        store: Shared by all gateways; stays the caller's.
        on_error: Whether requests pass (open) while it does not answer, or are refused.
        now_s: Seconds since 1970; the gateways' clocks should agree.
    """

    def __init__(
        self,
        store: Store,
        *,
        on_error: Literal["open", "closed"],
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._on_error = on_error
        self._now_s = now_s
        self._streams = LiveStreams(store, now_s, self._spawn)
        self._tasks: set[asyncio.Task[None]] = set()
        self._carrying: asyncio.Task[None] | None = None
        self._is_store_lost = False

    @asynccontextmanager
    async def admit(
        self,
        caller: Caller,
        num_prompt_tokens: int,
        max_tokens: int,
        num_output_tokens: Callable[[], int],
    ) -> AsyncIterator[None]:
        """Hold a request's place within its tenant's limits.

        Args:
            caller: Whose limits.
            num_prompt_tokens: Of the request.
            max_tokens: Of its answer.
            num_output_tokens: Asked at the end: tokens that the answer has become.

        Raises:
            InvalidArgumentError: It asks for more tokens than its tenant gets in a minute.
            OverloadedError: A limit is reached.
            UnavailableError: The store does not answer, and `on_error` is closed.
        """
        if caller.limits == NO_LIMITS:
            yield
            return
        num_tokens = num_prompt_tokens + max_tokens
        _check_possible(caller, num_prompt_tokens, max_tokens)
        hold = await self._reserve(caller, num_tokens)
        is_refused = False
        try:
            yield
        except (OverloadedError, UnavailableError):
            is_refused = num_output_tokens() == 0  # by whoever came next: nothing was computed
            raise
        finally:
            num_used = 0 if is_refused else num_prompt_tokens + num_output_tokens()
            self._give_back(hold, num_tokens=num_tokens - num_used)

    @asynccontextmanager
    async def readmit(
        self, caller: Caller, num_tokens: int, num_new_tokens: Callable[[], int]
    ) -> AsyncIterator[None]:
        """Hold the place of a request that goes on in another call.

        It may exceed the tokens of a minute, and `max_streams` by `RESUMED_FACTOR`: where a gateway
        died its streams are counted for a while, and come back meanwhile.

        Args:
            caller: Whose limits.
            num_tokens: That its answer may still get.
            num_new_tokens: Asked at the end: of these, those that it has got.

        Raises:
            OverloadedError: So many streams are too many.
        """
        if caller.limits == NO_LIMITS:
            yield
            return
        hold = _Hold(caller.tenant, self._now_s())
        try:
            await self._count_anyway(hold, caller.limits, num_tokens)
            yield
        finally:
            self._give_back(hold, num_tokens=num_tokens - num_new_tokens())

    async def close(self) -> None:
        """Return when all that is to be given back was, or could not be."""
        if self._carrying is not None:
            self._carrying.cancel()
            await asyncio.wait([self._carrying])
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _reserve(self, caller: Caller, num_tokens: int) -> _Hold:
        hold = _Hold(caller.tenant, self._now_s())
        try:
            await self._count_all(hold, caller.limits, num_tokens)
        except BaseException:  # a client that went away, too
            self._give_back(hold, num_requests=1, num_tokens=num_tokens)
            raise
        return hold

    async def _count_all(self, hold: _Hold, limits: RateLimits, num_tokens: int) -> None:
        try:
            # One after the other: of many at once, those that one limit refuses take no other's
            # room from those that it lets pass.
            await self._count(hold, _REQUESTS, limits.requests_per_minute, 1)
            await self._count(hold, _TOKENS, limits.tokens_per_minute, num_tokens)
            if limits.max_streams:
                await self._start(hold, limits.max_streams)
        except SluiceError as error:
            if isinstance(error, OverloadedError) and error.reason == RATE_LIMITED:
                raise
            self._on_lost(error)
        else:
            self._is_store_lost = False

    async def _count_anyway(self, hold: _Hold, limits: RateLimits, num_tokens: int) -> None:
        try:
            if limits.tokens_per_minute:
                await self._store.count(_key(hold, _TOKENS), num_tokens, _TTL_S)
                hold.counted.append(_TOKENS)
            if limits.max_streams:
                await self._start(hold, RESUMED_FACTOR * limits.max_streams)
        except SluiceError as error:
            if isinstance(error, OverloadedError) and error.reason == RATE_LIMITED:
                raise
            logger.debug("a request that goes on is not counted: %s", error)

    async def _count(self, hold: _Hold, name: str, limit: int, amount: int) -> None:
        """Add to the present minute, or raise that it may not have so much."""
        if not limit:
            return
        previous = await self._store.count(_key(hold, name, -1), 0, _TTL_S)
        window = Window(limit, previous, hold.arrived_s % WINDOW_S)
        total = await self._store.count(_key(hold, name), amount, _TTL_S, at_most=window.most)
        if total <= window.most:
            hold.counted.append(name)
            return
        num_present = total - amount
        retry_after_s = window.retry_after_s(num_present, amount)
        raise OverloadedError(
            f"tenant {hold.tenant} has had {limit - window.most + num_present} in the last minute, "
            f"this request needs {amount}, {name}={limit}: try again in {retry_after_s:g} s",
            retry_after_s=retry_after_s,
            reason=RATE_LIMITED,
        )

    async def _start(self, hold: _Hold, limit: int) -> None:
        """Count one more stream, or raise that there may be no more. None is no limit."""
        if not await self._streams.start(hold.tenant, limit):
            raise OverloadedError(
                f"tenant {hold.tenant} has as many requests that have not ended as it may, "
                f"max_streams={limit}: try again when one has",
                reason=RATE_LIMITED,
            )
        hold.is_live = True
        if self._carrying is None or self._carrying.done():
            self._carrying = asyncio.create_task(self._carry(), name="rate-limiter")

    def _on_lost(self, error: SluiceError) -> None:
        """Let a request pass that could not be counted, or raise that it may not."""
        if not self._is_store_lost:
            logger.warning("rate limits fail %s, the store is lost: %s", self._on_error, error)
        self._is_store_lost = True
        if self._on_error == "closed":
            raise UnavailableError(
                "the limits of this tenant cannot be looked up, "
                "gateway.rate_limit_on_error=closed: try again later"
            ) from error

    def _give_back(self, hold: _Hold, *, num_requests: int = 0, num_tokens: int) -> None:
        """End a hold, and take back what was counted for nothing, if anybody still reads it."""
        has_passed = int(self._now_s() // WINDOW_S) - hold.minute > 1
        for name, amount in ((_REQUESTS, num_requests), (_TOKENS, num_tokens)):
            if amount and name in hold.counted and not has_passed:
                self._spawn(self._subtract(_key(hold, name), amount))
        if hold.is_live:
            self._streams.end(hold.tenant)

    async def _subtract(self, key: str, amount: int) -> None:
        await self._store.count(key, -amount, _TTL_S)

    async def _carry(self) -> None:
        while not self._streams.is_idle:
            await asyncio.sleep(PERIOD_S / 2)
            try:
                await self._streams.carry()
            except SluiceError as error:
                logger.debug("streams not carried into the next period: %s", error)
            except Exception:  # without it this gateway's streams would be forgotten
                logger.exception("streams not carried into the next period")

    def _spawn(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(_tried(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _tried(call: Coroutine[Any, Any, None]) -> None:
    try:
        await call
    except SluiceError as error:
        logger.debug("rate limits count too much or too little for a while: %s", error)


def _key(hold: _Hold, name: str, minutes_later: int = 0) -> str:
    return f"rate:{name}:{hold.tenant}:{hold.minute + minutes_later}"


def _check_possible(caller: Caller, num_prompt_tokens: int, max_tokens: int) -> None:
    limit = caller.limits.tokens_per_minute
    if limit and num_prompt_tokens + max_tokens > limit:
        raise InvalidArgumentError(
            f"{num_prompt_tokens} prompt tokens + max_tokens={max_tokens}, "
            f"tokens_per_minute={limit} of tenant {caller.tenant}: ask for fewer",
            field="sampling.max_tokens",
        )
