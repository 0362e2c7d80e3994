"""Commands to Redis and their replies: one round trip per server, one deadline, nothing retried.

    batches   [keys of shard 3: MGET, EVAL]  [keys of shard 5: MULTI .. EXEC]  [shard 8: ...]
    servers   node A ◄── one write, replies in order ──┘ └──────► node B ◄──────────────┘

What is sent twice could be there twice, and every caller can do without a store; so a call that
failed, or met a server that is not responsible any more, ends with `UnavailableError`, and the next
one asks for the way anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from cluster.errors import UnavailableError
from cluster.kvstore.redis_connection import Command, RedisConnection
from cluster.kvstore.redis_replies import OnValue
from cluster.kvstore.redis_route import ClusterRoute, FixedRoute, Route, SentinelRoute
from cluster.kvstore.redis_url import Address, RedisKind, RedisTarget

MAX_CALLS = 16  # on their way at once; more wait, within their deadlines

# How the texts of servers begin that are not, or not any more, responsible for a key.
_NOT_RESPONSIBLE = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "LOADING")


class RedisMemoryError(UnavailableError):
    """Redis has reached its own `maxmemory` and may not evict: nothing was written."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Commands whose keys are all in one slot of a cluster."""

    key: bytes  # one of the keys, or what has their hash tag
    commands: list[Command]
    is_atomic: bool = False  # no other client's command comes between them


@dataclass(frozen=True, slots=True)
class _Server:
    address: Address | None  # None: behind the path of a socket
    is_sentinel: bool = False


class RedisLink:
    """Connections to one Redis, standalone, behind sentinels, or a cluster; of one event loop.

    Args:
        target: No connection is made before the first call.
        timeout_s: Deadline of one call.
    """

    def __init__(self, target: RedisTarget, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._idle: dict[_Server, list[RedisConnection]] = {}
        self._calls = asyncio.Semaphore(MAX_CALLS)
        self._route = self._make_route()
        self._is_closed = False

    @property
    def is_cluster(self) -> bool:
        """Whether keys are spread over servers by their slots."""
        return self._target.kind is RedisKind.CLUSTER

    async def run(
        self, name: str, *batches: Batch, on_value: OnValue | None = None
    ) -> list[list[Any]]:
        """Send batches; return the replies to the commands of each.

        Args:
            name: Of the operation, for errors.
            batches: Any number; those for one server travel together.
            on_value: See `ReplyReader.expect`.

        Raises:
            RedisMemoryError: Redis has no memory for it.
            UnavailableError: A server could not be reached, refused, or did not answer in time.
        """
        try:
            async with asyncio.timeout(self._timeout_s), self._calls:
                return await self._run(batches, on_value)
        except TimeoutError:
            problem = f"no answer within store.timeout_s={self._timeout_s:g}"
            self._route.forget()
        except (RedisError, OSError) as error:
            problem = (str(error) or type(error).__name__).splitlines()[0]
            is_lost = isinstance(error, RedisConnectionError | OSError)
            if is_lost or problem.startswith(_NOT_RESPONSIBLE):
                self._route.forget()
            if problem.startswith("OOM"):
                raise RedisMemoryError(self._text(name, problem)) from None
        raise UnavailableError(self._text(name, problem))

    async def close(self) -> None:
        """Close the connections that are idle; those in use are closed after their calls."""
        self._is_closed = True
        for connections in self._idle.values():
            for connection in connections:
                await connection.close()
        self._idle.clear()

    def _text(self, name: str, problem: str) -> str:
        return f"Redis at {self._target.label}, {name}: {problem}"

    def _make_route(self) -> Route:
        addresses = self._target.addresses
        # A silent server leaves as much time to each other one, and to the call itself.
        share_s = self._timeout_s / (len(addresses) + 1)
        if self._target.kind is RedisKind.SENTINEL:

            async def ask_sentinel(address: Address | None, command: Command) -> Any:
                server = _Server(address, is_sentinel=True)
                return (await self._exchange(server, [Batch(b"", [command])]))[0][0]

            return SentinelRoute(addresses, self._target.service, ask_sentinel, share_s)
        if self._target.kind is RedisKind.CLUSTER:

            async def ask_node(address: Address | None, command: Command) -> Any:
                return (await self._exchange(_Server(address), [Batch(b"", [command])]))[0][0]

            return ClusterRoute(addresses, ask_node, share_s)
        return FixedRoute(addresses[0] if addresses else None)

    async def _run(self, batches: Sequence[Batch], on_value: OnValue | None) -> list[list[Any]]:
        servers = await self._route.find([batch.key for batch in batches])
        groups: dict[Address | None, list[int]] = {}
        for index, server in enumerate(servers):
            groups.setdefault(server, []).append(index)
        replies: list[list[Any]] = [[] for _ in batches]

        async def exchange(server: Address | None, indexes: list[int]) -> None:
            answers = await self._exchange(_Server(server), [batches[i] for i in indexes], on_value)
            for index, answer in zip(indexes, answers, strict=True):
                replies[index] = answer

        if len(groups) == 1:  # no task for the usual case
            ((server, indexes),) = groups.items()
            await exchange(server, indexes)
            return replies
        problems = await asyncio.gather(
            *(exchange(server, indexes) for server, indexes in groups.items()),
            return_exceptions=True,
        )
        for problem in problems:
            if problem is not None:
                raise problem
        return replies

    async def _exchange(
        self, server: _Server, batches: Sequence[Batch], on_value: OnValue | None = None
    ) -> list[list[Any]]:
        """Send batches to one server, all in one write, and read all replies."""
        connection = await self._connection(server)
        commands = [command for batch in batches for command in _framed(batch)]
        try:
            replies = iter(await connection.exchange(commands, on_value))
        except BaseException:
            # Replies may be on their way still: nobody may take them for those to the next call.
            connection.abort()
            raise
        if self._is_closed:
            connection.abort()
        else:
            self._idle.setdefault(server, []).append(connection)
        return [_answers(batch, list(islice(replies, _num_replies(batch)))) for batch in batches]

    async def _connection(self, server: _Server) -> RedisConnection:
        idle = self._idle.get(server, [])
        while idle:
            connection = idle.pop()
            if connection.is_open:
                return connection
        target = self._target
        options = target.sentinel_options if server.is_sentinel else target.options
        return await RedisConnection.open(options, server.address)


def _framed(batch: Batch) -> list[Command]:
    return [("MULTI",), *batch.commands, ("EXEC",)] if batch.is_atomic else batch.commands


def _num_replies(batch: Batch) -> int:
    return len(batch.commands) + 2 * batch.is_atomic


def _answers(batch: Batch, replies: list[Any]) -> list[Any]:
    """Return the replies to a batch's own commands.

    Raises:
        ResponseError: One of them is an error.
    """
    if batch.is_atomic and isinstance(replies[-1], list):
        replies = replies[-1]
    # Else what was refused while it was queued says why EXEC did nothing.
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
