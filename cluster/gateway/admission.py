"""Who may come in: bounded counts, no I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cluster.config import GatewayConfig
from cluster.errors import InvalidArgumentError, OverloadedError, UnavailableError

_RETRY_AFTER_S = 1.0


class Admission:
    """Counts the requests of one gateway, and refuses what exceeds its bounds."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._live: dict[str, asyncio.Event] = {}  # by id: set when the request has ended
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

    async def wait_idle(self, timeout_s: float) -> bool:
        """Return whether no request is in flight, as soon as none is or the time is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return not self._live

    async def wait_free(self, request_id: str, timeout_s: float) -> bool:
        """Return whether no request has an id, as soon as it has ended or the time is over."""
        ended = self._live.get(request_id)
        if ended is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), timeout_s)
        return request_id not in self._live  # the next one may have taken it

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
        self._live[request_id] = ended = asyncio.Event()
        self._idle.clear()
        try:
            yield
        finally:
            del self._live[request_id]
            ended.set()
            if not self._live:
                self._idle.set()

    def check_invariants(self) -> None:
        """Assert what must hold at all times."""
        assert len(self._live) <= self._config.max_inflight_requests
        assert self._idle.is_set() == (not self._live)
