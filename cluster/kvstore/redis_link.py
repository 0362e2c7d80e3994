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

from cluster.clock import Clock
from cluster.errors import UnavailableError
from cluster.kvstore.breaker import CircuitBreaker
from cluster.kvstore.redis_connection import Command, RedisConnection
from cluster.kvstore.redis_pool import RedisPool, Server
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


Outcome = list[Any] | UnavailableError
"""The replies to the commands of a batch, or why there are none."""


class RedisLink:
    """Connections to one Redis, standalone, behind sentinels, or a cluster; of one event loop.

    Of a cluster each node has a circuit breaker: one that does not answer costs a deadline now and
    then, not each call. A single server has none here, but with who calls.

    Args:
        target: No connection is made before the first call.
        timeout_s: Deadline of one call.
        clock: Of the breakers.
    """

    def __init__(self, target: RedisTarget, timeout_s: float, clock: Clock) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._clock = clock
        self._pool = RedisPool(self._open)
        self._calls = asyncio.Semaphore(MAX_CALLS)
        self._route = self._make_route()
        self._servers = self._route.servers
        self._breakers: dict[Address | None, CircuitBreaker] = {}

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
        replies: list[list[Any]] = []
        for outcome in await self._outcomes(name, batches, on_value):
            if isinstance(outcome, UnavailableError):
                raise outcome
            replies.append(outcome)
        return replies

    async def run_some(
        self, name: str, *batches: Batch, on_value: OnValue | None = None
    ) -> list[Outcome]:
        """Send batches that can do without each other; return how each of them ended.

        Args:
            name: As for `run`, like the others.
            batches: ...
            on_value: ...

        Raises:
            RedisMemoryError: All of them failed, and one because Redis has no memory for it.
            UnavailableError: All of them failed.
        """
        outcomes = await self._outcomes(name, batches, on_value)
        errors = [outcome for outcome in outcomes if isinstance(outcome, UnavailableError)]
        if errors and len(errors) == len(outcomes):
            raise next((e for e in errors if isinstance(e, RedisMemoryError)), errors[0])
        return outcomes

    async def close(self) -> None:
        """Close the connections that are idle; those in use are closed after their calls."""
        self._pool.close()

    async def _outcomes(
        self, name: str, batches: Sequence[Batch], on_value: OnValue | None
    ) -> list[Outcome]:
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._calls.acquire()
        except TimeoutError as error:
            return [self._failed(name, error)] * len(batches)
        try:
            return await self._send(name, batches, on_value, deadline_s)
        finally:
            self._calls.release()

    async def _send(
        self, name: str, batches: Sequence[Batch], on_value: OnValue | None, deadline_s: float
    ) -> list[Outcome]:
        try:
            async with asyncio.timeout_at(deadline_s):
                servers = await self._route.find([batch.key for batch in batches])
        except (RedisError, OSError, TimeoutError) as error:
            return [self._failed(name, error)] * len(batches)
        self._follow_route()
        groups: dict[Address | None, list[int]] = {}
        for index, server in enumerate(servers):
            groups.setdefault(server, []).append(index)
        outcomes: list[Outcome] = [[] for _ in batches]

        async def ask(address: Address | None, indexes: list[int]) -> None:
            group = [batches[i] for i in indexes]
            answers = await self._ask(name, address, group, on_value, deadline_s)
            for index, answer in zip(indexes, answers, strict=True):
                outcomes[index] = answer

        if len(groups) == 1:  # no task for the usual case
            await ask(*next(iter(groups.items())))
        else:
            await asyncio.gather(*(ask(address, indexes) for address, indexes in groups.items()))
        return outcomes

    async def _ask(
        self,
        name: str,
        address: Address | None,
        batches: Sequence[Batch],
        on_value: OnValue | None,
        deadline_s: float,
    ) -> list[Outcome]:
        """Send batches to one server; return how each of them ended."""
        breaker = self._breakers.get(address)
        if breaker is not None and not breaker.allow():
            problem = RedisConnectionError("a node did not answer lately")
            return [self._failed(name, problem)] * len(batches)
        try:
            async with asyncio.timeout_at(deadline_s):
                answers = await self._exchange(Server(address), batches, on_value)
        except (RedisError, OSError, TimeoutError) as error:
            if breaker is not None:
                breaker.failed()
            self._pool.drop(Server(address))
            return [self._failed(name, error)] * len(batches)
        if breaker is not None:
            breaker.succeeded()
        return [
            self._failed(name, answer) if isinstance(answer, RedisError) else answer
            for answer in answers
        ]

    def _failed(self, name: str, error: Exception) -> UnavailableError:
        """Return what a caller gets for an error; where it may mean another way, ask for it."""
        problem = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, TimeoutError):
            problem = f"no answer within store.timeout_s={self._timeout_s:g}"
        is_lost = isinstance(error, RedisConnectionError | OSError)  # TimeoutError is an OSError
        if is_lost or problem.startswith(_NOT_RESPONSIBLE):
            self._route.forget()
        kind = RedisMemoryError if problem.startswith("OOM") else UnavailableError
        return kind(f"Redis at {self._target.label}, {name}: {problem}")

    def _follow_route(self) -> None:
        """Let go of what belongs to servers that have no keys any more."""
        servers = self._route.servers
        if servers == self._servers:
            return
        self._servers = servers
        addresses = servers.union(self._target.addresses)
        self._pool.keep({Server(address, role) for address in addresses for role in (False, True)})
        if self.is_cluster:
            max_open_s = max(2.0, 2 * self._timeout_s)  # no probe is given up before its deadline
            self._breakers = {
                server: self._breakers.get(server)
                or CircuitBreaker(self._clock, max_open_s=max_open_s)
                for server in servers
            }

    def _make_route(self) -> Route:
        addresses = self._target.addresses
        # A silent server leaves as much time to each other one, and to the call itself.
        share_s = self._timeout_s / (len(addresses) + 1)
        if self._target.kind is RedisKind.STANDALONE:
            return FixedRoute(addresses[0] if addresses else None)
        is_sentinel = self._target.kind is RedisKind.SENTINEL

        async def ask(address: Address | None, command: Command) -> Any:
            server = Server(address, is_sentinel)
            (answer,) = await self._exchange(server, [Batch(b"", [command])])
            if isinstance(answer, RedisError):
                raise answer
            return answer[0]

        if is_sentinel:
            return SentinelRoute(addresses, self._target.service, ask, share_s)
        return ClusterRoute(addresses, ask, share_s)

    async def _exchange(
        self, server: Server, batches: Sequence[Batch], on_value: OnValue | None = None
    ) -> list[list[Any] | RedisError]:
        """Send batches to one server, all in one write, and read all replies."""
        connection = await self._pool.take(server)
        commands = [command for batch in batches for command in _framed(batch)]
        try:
            replies = iter(await connection.exchange(commands, on_value))
        except BaseException:
            # Replies may be on their way still: nobody may take them for those to the next call.
            connection.abort()
            raise
        self._pool.give(server, connection)
        return [_answers(batch, list(islice(replies, _num_replies(batch)))) for batch in batches]

    async def _open(self, server: Server) -> RedisConnection:
        target = self._target
        options = target.sentinel_options if server.is_sentinel else target.options
        return await RedisConnection.open(options, server.address)


def _framed(batch: Batch) -> list[Command]:
    return [("MULTI",), *batch.commands, ("EXEC",)] if batch.is_atomic else batch.commands


def _num_replies(batch: Batch) -> int:
    return len(batch.commands) + 2 * batch.is_atomic


def _answers(batch: Batch, replies: list[Any]) -> list[Any] | RedisError:
    """Return the replies to a batch's own commands, or the first error among them."""
    if batch.is_atomic and isinstance(replies[-1], list):
        replies = replies[-1]
    # Else what was refused while it was queued says why EXEC did nothing.
    for reply in replies:
        if isinstance(reply, RedisError):
            return reply
    return replies
