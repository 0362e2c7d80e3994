"""One connection to Redis: redis-py opens it (TLS, ACL, database), then the bytes are ours.

redis-py reads replies through a stream and a parser that copy each byte three times; KV blocks are
received by `ReplyReader` where they stay. Commands are packed by hiredis.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import Connection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cluster.kvstore.redis_replies import OnValue, ReplyReader
from cluster.kvstore.redis_url import Address

Command = tuple[Any, ...]  # the name first; arguments are bytes, texts or integers

_MIN_ALONE_BYTES = 2**14  # of an argument that is not copied into the text of its command


class RedisConnection:
    """An open connection, for one call at a time; belongs to one event loop."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._transport: asyncio.Transport = connection._writer.transport
        self._reader = ReplyReader()
        self._reader.attach(self._transport)

    @classmethod
    async def open(cls, options: dict[str, Any], address: Address | None) -> RedisConnection:
        """Connect and authenticate; the deadline is the caller's.

        Args:
            options: Of redis-py's connection, `connection_class` among them if it is another one.
            address: Of the server; None where the options have a path.

        Raises:
            RedisError: The server cannot be reached, or refuses.
        """
        options = {"protocol": 2, "retry": Retry(NoBackoff(), 0), "socket_timeout": None} | options
        if address is not None:
            options |= {"host": address[0], "port": address[1]}
        make: Any = options.pop("connection_class", Connection)
        connection = make(**options)
        try:
            await connection.connect()
            return cls(connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise

    @property
    def is_open(self) -> bool:
        """Whether the server has not closed it."""
        return not self._reader.is_lost and not self._transport.is_closing()

    def when_lost(self, on_lost: Callable[[], None] | None) -> None:
        """Have something called when the server closes it; None: nothing any more."""
        self._reader.on_lost = on_lost

    async def exchange(
        self, commands: Sequence[Command], on_value: OnValue | None = None
    ) -> list[Any]:
        """Send commands in one write; return their replies, errors among them as values.

        After an exception it cannot be used any more.

        Args:
            commands: At least one.
            on_value: See `ReplyReader.expect`.

        Raises:
            RedisConnectionError: The connection was lost.
        """
        replies = self._reader.expect(len(commands), on_value)
        self._transport.writelines(_packed(commands))
        return await replies

    def abort(self) -> None:
        """Close it at once; what is on its way is lost."""
        self._transport.abort()
        # Its streams are closed with the transport; redis-py would warn that nobody closed them.
        self._connection._reader = self._connection._writer = None


def _packed(commands: Sequence[Command]) -> list[bytes]:
    """Return what goes over the wire; long arguments stand alone, for they are not copied here."""
    pieces: list[bytes] = []
    for command in commands:
        if any(isinstance(item, bytes) and len(item) >= _MIN_ALONE_BYTES for item in command):
            pieces.append(b"*%d\r\n" % len(command))
            for item in command:
                data = item if isinstance(item, bytes) else str(item).encode()
                pieces += (b"$%d\r\n" % len(data), data, b"\r\n")
        else:
            pieces.append(hiredis.pack_command(command))
    return pieces
