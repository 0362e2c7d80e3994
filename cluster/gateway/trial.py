"""Suspects run one after the other, so that the replica that dies next convicts the right one."""

from __future__ import annotations

import asyncio

from cluster.errors import UnavailableError


class Trial:
    """One request's place in the court of its gateway.

    Args:
        lock: Of the gateway.
        timeout_s: To wait for its turn, seconds.
    """

    def __init__(self, lock: asyncio.Lock, *, timeout_s: float) -> None:
        self._lock = lock
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None  # while it is on

    async def begin(self) -> None:
        """Return when no other suspect runs; until `end`, none does.

        Raises:
            UnavailableError: Its turn did not come in time.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._lock.acquire()
        except TimeoutError as error:
            raise UnavailableError(
                "replicas were lost with this request and with others, which are tried one after "
                "the other; its turn did not come within "
                f"gateway.queue_timeout_s={self._timeout_s:g}"
            ) from error
        # A client that reads nothing, or a long prompt, does not hold up all others.
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self.end)

    def end(self) -> None:
        """Let the next one begin; fine if this one has not."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._lock.release()
