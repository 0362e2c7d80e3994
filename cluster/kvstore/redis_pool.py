"""Open connections that nobody uses at present, by their server.

take ── an idle one, or a new one ──► a call ── give, if it ended well ──► idle
                                                                            │
closed: by the server, with a server that failed or that the route left ◄───┘
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import partial

from cluster.kvstore.redis_connection import RedisConnection
from cluster.kvstore.redis_url import Address


@dataclass(frozen=True, slots=True)
class Server:
    """One that connections lead to."""

    address: Address | None  # None: behind the path of a socket
    is_sentinel: bool = False


class RedisPool:
    """Connections of one link; belongs to its event loop.

    Args:
        open_one: Connects to a server.
    """

    def __init__(self, open_one: Callable[[Server], Awaitable[RedisConnection]]) -> None:
        self._open_one = open_one
        self._idle: dict[Server, list[RedisConnection]] = {}
        self._kept: Collection[Server] | None = None  # None: every server
        self._is_closed = False

    @property
    def num_idle(self) -> int:
        """Connections that nobody uses."""
        return sum(map(len, self._idle.values()))

    async def take(self, server: Server) -> RedisConnection:
        """Return a connection for one call.

        Raises:
            RedisError: The server cannot be reached, or refuses.
        """
        idle = self._idle.get(server, [])
        while idle:
            connection = idle.pop()
            connection.when_lost(None)
            if connection.is_open:
                return connection
        return await self._open_one(server)

    def give(self, server: Server, connection: RedisConnection) -> None:
        """Take back a connection on which nothing is on its way."""
        is_kept = self._kept is None or server in self._kept
        if self._is_closed or not is_kept or not connection.is_open:
            connection.abort()
            return
        self._idle.setdefault(server, []).append(connection)
        connection.when_lost(partial(self._forget, server, connection))

    def drop(self, server: Server) -> None:
        """Close the idle connections to a server that failed: they would as well."""
        for connection in self._idle.pop(server, []):
            connection.when_lost(None)
            connection.abort()

    def keep(self, servers: Collection[Server]) -> None:
        """Close connections to all others, now or when they are given back."""
        self._kept = servers
        for server in [server for server in self._idle if server not in servers]:
            self.drop(server)

    def close(self) -> None:
        """Close the idle ones; those in use are closed when they are given back."""
        self._is_closed = True
        for server in list(self._idle):
            self.drop(server)

    def _forget(self, server: Server, connection: RedisConnection) -> None:
        """Take an idle connection out that the server has closed."""
        self._idle[server].remove(connection)
        if not self._idle[server]:
            del self._idle[server]
        connection.abort()
