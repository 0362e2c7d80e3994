"""Which Redis server has a key: a fixed one, the master that sentinels name, a node of a cluster.

A route is asked before every call and answers from what it remembers. Who sees that a server is
gone, or not responsible any more, says `forget`: the next call asks anew.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from cluster.kvstore.redis_url import Address

NUM_SLOTS = 16384
"""Of every Redis Cluster."""

Ask = Callable[[Address | None, tuple[str, ...]], Awaitable[Any]]
"""Send one command to a server, None: the one behind a socket's path."""


class Route(Protocol):
    """Finds servers; belongs to one event loop."""

    @property
    def servers(self) -> frozenset[Address | None]:
        """Those that keys were last seen on; empty before the first answer."""
        ...

    async def find(self, keys: Sequence[bytes]) -> list[Address | None]:
        """Return the server of each key; None: the one behind a socket's path.

        Raises:
            RedisError: Nobody who knows could be asked.
        """
        ...

    def forget(self) -> None:
        """Ask anew before the next call."""
        ...


class FixedRoute:
    """One server has all keys."""

    def __init__(self, address: Address | None) -> None:
        self._address = address

    @property
    def servers(self) -> frozenset[Address | None]:
        """The server."""
        return frozenset([self._address])

    async def find(self, keys: Sequence[bytes]) -> list[Address | None]:
        """Return the server, once per key."""
        return [self._address] * len(keys)

    def forget(self) -> None:
        """Do nothing: there is no other."""


class SentinelRoute:
    """The master of a service has all keys.

    Args:
        sentinels: Asked in turn, the one that answered last first.
        service: Its name there.
        ask: Sends a command to a sentinel.
        timeout_s: Of one sentinel: a silent one must leave time for the next.
    """

    def __init__(
        self, sentinels: Sequence[Address], service: str, ask: Ask, timeout_s: float
    ) -> None:
        self._sentinels = list(sentinels)
        self._service = service
        self._ask = ask
        self._timeout_s = timeout_s
        self._master: Address | None = None
        self._servers: frozenset[Address | None] = frozenset()

    @property
    def servers(self) -> frozenset[Address | None]:
        """The master that was named last."""
        return self._servers

    async def find(self, keys: Sequence[bytes]) -> list[Address | None]:
        """Return the master, once per key."""
        master = self._master or await self._find_master()
        return [master] * len(keys)

    def forget(self) -> None:
        """Ask the sentinels before the next call."""
        self._master = None

    async def _find_master(self) -> Address:
        for sentinel in list(self._sentinels):
            try:
                async with asyncio.timeout(self._timeout_s):
                    found = await self._ask(
                        sentinel, ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
                    )
            except (RedisError, OSError, TimeoutError):
                continue
            if found:
                self._sentinels.sort(key=lambda other: other != sentinel)
                self._master = (found[0].decode(), int(found[1]))
                self._servers = frozenset([self._master])
                return self._master
        raise RedisConnectionError(
            f"none of {len(self._sentinels)} sentinels knows a master of {self._service}"
        )


class _Range(NamedTuple):
    first: int  # slot
    last: int  # slot, inclusive
    node: Address


class ClusterRoute:
    """Each slot of keys has a node.

    Args:
        nodes: Some of the cluster's, to ask first.
        ask: Sends a command to a node.
        timeout_s: Of one node, as for sentinels.
    """

    def __init__(self, nodes: Sequence[Address], ask: Ask, timeout_s: float) -> None:
        self._seeds = tuple(nodes)
        self._known = list(nodes)  # to ask, in this order
        self._ask = ask
        self._timeout_s = timeout_s
        self._ranges: list[_Range] = []  # ascending
        self._servers: frozenset[Address | None] = frozenset()

    @property
    def servers(self) -> frozenset[Address | None]:
        """The nodes of the last answer."""
        return self._servers

    async def find(self, keys: Sequence[bytes]) -> list[Address | None]:
        """Return the node of each key."""
        ranges = self._ranges or await self._find_ranges()
        return [self._node_of(key_slot(key), ranges) for key in keys]

    def forget(self) -> None:
        """Ask a node for all ranges before the next call."""
        self._ranges = []

    def _node_of(self, slot: int, ranges: list[_Range]) -> Address:
        index = bisect_left(ranges, slot, key=lambda a_range: a_range.last)
        if index == len(ranges) or ranges[index].first > slot:
            self.forget()
            raise RedisConnectionError(f"no node of the cluster serves slot {slot}")
        return ranges[index].node

    async def _find_ranges(self) -> list[_Range]:
        for node in list(self._known):
            try:
                async with asyncio.timeout(self._timeout_s):
                    rows = await self._ask(node, ("CLUSTER", "SLOTS"))
            except (RedisError, OSError, TimeoutError):
                continue
            if rows:
                return self._remember(node, rows)
        raise RedisConnectionError(f"none of {len(self._known)} nodes of the cluster answers")

    def _remember(self, asked: Address, rows: list[Any]) -> list[_Range]:
        ranges = []
        for first, last, (host, port, *_), *_ in rows:
            # A node that does not know its own name leaves it empty: it is the one we asked.
            node = (host.decode() if host else asked[0], int(port))
            ranges.append(_Range(int(first), int(last), node))
        self._ranges = sorted(ranges)
        self._servers = frozenset(a_range.node for a_range in ranges)
        # The one that answered comes first: a silent one would cost its share of every question.
        nodes = [asked, *(a_range.node for a_range in ranges), *self._seeds]
        self._known = list(dict.fromkeys(nodes))
        return self._ranges
