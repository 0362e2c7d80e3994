"""Who may come in: bounded counts, no I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.config import GatewayConfig
from cluster.errors import InvalidArgumentError, OverloadedError, UnavailableError

_RETRY_AFTER_S = 1.0


class Admission:
    """Counts the requests of one gateway, and refuses what exceeds its bounds."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._live: set[str] = set()  # ids of admitted requests
        self._is_closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_inflight(self) -> int:
        """Requests that were admitted and have not ended, those that wait for a replica too."""
        return len(self._live)

    def close(self) -> None:
        """Admit no more requests."""
        self._is_closed = True

    async def wait_idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()

    @contextmanager
    def admit(self, request_id: str) -> Iterator[None]:
        """Hold a place among the requests in flight.

        Raises:
            UnavailableError: The gateway is shutting down.
            OverloadedError: Too many requests are in flight.
            InvalidArgumentError: A request of this id has not ended.
        """
        limit = self._config.max_inflight_requests
        if self._is_closed:
            raise UnavailableError("this gateway is shutting down: connect again")
        if len(self._live) >= limit:
            raise OverloadedError(
                f"{len(self._live)} requests in flight, "
                f"gateway.max_inflight_requests={limit}: try again later",
                retry_after_s=_RETRY_AFTER_S,
            )
        if request_id in self._live:
            raise InvalidArgumentError(
                f"request_id={request_id!r} belongs to a request that has not ended: "
                "choose another, or leave it to the server",
                field="request_id",
            )
        self._live.add(request_id)
        self._idle.clear()
        try:
            yield
        finally:
            self._live.remove(request_id)
            if not self._live:
                self._idle.set()

    def check_invariants(self) -> None:
        """Assert what must hold at all times."""
        assert len(self._live) <= self._config.max_inflight_requests
        assert self._idle.is_set() == (not self._live)
