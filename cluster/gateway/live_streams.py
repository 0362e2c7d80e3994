"""How many requests of a tenant run at all gateways; a gateway that died does not count for long.

Time is cut into periods, each with a counter per tenant in the store. What runs is counted in the
present period and in the next one, so that the next one is complete when it begins:

    period          7           8           9
    start in 7     +1          +1
    carried in 8                           +1     by the gateway that still has it
    end in 8                   -1          -1

What a dead gateway had is carried by nobody: it is gone when two periods are over. So is what a
call that failed has left wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from cluster.kvstore.store import Store

PERIOD_S = 10.0
_TTL_S = 3 * PERIOD_S  # a period's counter is added to in the period before, too


class LiveStreams:
    """What runs at one gateway, counted together with what runs at the others.

    Exact as long as the store answers and the gateways' clocks agree. Of what starts while they
    differ about the period, as much as fits the limit may come on top of it, until that ends.

    Args:
        store: Shared by all gateways.
        now_s: Seconds since 1970.
        spawn: Runs a call beside this one; it may fail.
    """

    def __init__(
        self,
        store: Store,
        now_s: Callable[[], float],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._store = store
        self._now_s = now_s
        self._spawn = spawn
        self._num_live: dict[str, int] = {}  # here, by tenant
        self._last_period: dict[str, int] = {}  # in which they are all counted, by tenant

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs here."""
        return not any(self._num_live.values())

    async def start(self, tenant: str, limit: int) -> bool:
        """Count one more, if that is within the limit; return whether it is.

        Raises:
            UnavailableError: The store does not answer; nothing is counted.
        """
        period = self._period()
        await self._carry(tenant, period)
        total = await self._store.count(_key(tenant, period), 1, _TTL_S, at_most=limit)
        if total > limit:
            return False
        # Nothing is awaited from here on: what was counted is known here.
        self._num_live[tenant] = self._num_live.get(tenant, 0) + 1
        last = self._last_period.setdefault(tenant, period)
        self._spawn(self._add(tenant, range(period + 1, last + 1), 1))
        return True

    def end(self, tenant: str) -> None:
        """Count one that was started no more."""
        self._num_live[tenant] -= 1
        period = self._period()
        last = min(self._last_period[tenant], period + 1)
        self._spawn(self._add(tenant, range(period, last + 1), -1))

    async def carry(self) -> None:
        """Count what runs here in the next period too; to be called in every period.

        Raises:
            UnavailableError: The store does not answer.
        """
        period = self._period()
        for tenant in list(self._last_period):
            if self._num_live.get(tenant):
                await self._carry(tenant, period)
            else:
                self._num_live.pop(tenant, None)
                self._last_period.pop(tenant, None)

    async def _carry(self, tenant: str, period: int) -> None:
        first = max(self._last_period.get(tenant, period - 1) + 1, period)
        # Before the store has answered: what starts or ends meanwhile adds its own to these.
        self._last_period[tenant] = period + 1
        await self._add(tenant, range(first, period + 2), self._num_live.get(tenant, 0))

    async def _add(self, tenant: str, periods: range, amount: int) -> None:
        if amount:
            keys = (_key(tenant, period) for period in periods)
            await asyncio.gather(*(self._store.count(key, amount, _TTL_S) for key in keys))

    def _period(self) -> int:
        return int(self._now_s() // PERIOD_S)


def _key(tenant: str, period: int) -> str:
    return f"streams:{tenant}:{period}"
