"""What goes wrong with the Redis of a benchmark, and how it is made good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from redis import Redis

from cluster.bench.store_proxy import ProxyProcess
from cluster.bench.store_redis import OwnRedis

DELAY_S = 30
LOST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    name: str
    begin: Callable[[], None]
    end: Callable[[], None]


class FaultySetup:
    """A redis-server behind a network that can fail."""

    def __init__(self) -> None:
        self._server = OwnRedis()
        try:
            self._proxy = ProxyProcess(self._server.port)
        except BaseException:
            self._server.close()
            raise

    @property
    def url(self) -> str:
        """Of the server, through the network."""
        return f"redis://127.0.0.1:{self._proxy.port}/0"

    def faults(self) -> list[Fault]:
        """Return all that can go wrong."""
        return [
            Fault("black hole", *self._orders("black_hole")),
            Fault(f"answers after {DELAY_S} s", *self._orders(f"delay {DELAY_S}")),
            Fault(f"{LOST_SHARE:.0%} of packets lost", *self._orders(f"drop {LOST_SHARE}")),
            Fault("killed, restarted empty", self._server.kill, self._server.start),
            Fault("flushed", lambda: self._ask("FLUSHALL"), lambda: None),
            Fault(
                "out of memory",
                lambda: self._ask("CONFIG", "SET", "maxmemory", 1),
                lambda: self._ask("CONFIG", "SET", "maxmemory", 0),
            ),
        ]

    def close(self) -> None:
        """End both."""
        self._proxy.close()
        self._server.close()

    def _orders(self, order: str) -> tuple[Callable[[], None], Callable[[], None]]:
        return lambda: self._proxy.order(order), lambda: self._proxy.order("pass")

    def _ask(self, *command: Any) -> None:
        connection: Any = Redis.from_url(self._server.url)
        try:
            connection.execute_command(*command)
        finally:
            connection.close()
