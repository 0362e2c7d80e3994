"""A cluster of real processes without Ray, whose members are killed and replaced.

    client ──► gateways ──► leaders        each a process, forked by one nursery
                   └───── redis-server ────┘

Leaders compute with one thread each, keep no blocks below the KV cache and in no store: what
follows a death is computed anew, as where nobody has cached it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from cluster.bench.resumption_nursery import Member, Nursery
from cluster.bench.store_redis import OwnRedis
from cluster.client import AsyncClient
from cluster.config import ClusterConfig, load_config
from cluster.errors import SluiceError, UnavailableError

READY_TIMEOUT_S = 30.0  # for all gateways to have all leaders
_END_TIMEOUT_S = 5.0
_POLL_S = 0.02
_KNOBS = (
    "cache.host_memory_bytes=0",
    "gateway.port=0",
    "parallel.threads_per_worker=1",
    "store.kv_url=off",
)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a cluster consists of."""

    num_leaders: int = 3
    num_gateways: int = 1
    overrides: tuple[str, ...] = ()  # of the configuration
    min_step_s: float = 0.01  # of every step of an engine
    executor: str = ""  # package.module:name of what wraps each leader's executor; empty: nothing


class ResumptionCluster:
    """Leaders, gateways and a Redis of their own; an asynchronous context.

    Args:
        layout: What it consists of, and is brought back to by `restore`.
        nursery: Forks its members; stays the caller's. None starts one.
    """

    def __init__(self, layout: Layout, nursery: Nursery | None = None) -> None:
        self.layout = layout
        self._nursery = nursery
        self.leaders: dict[str, Member] = {}  # that were not killed here, by replica id
        self.gateways: dict[str, Member] = {}  # likewise, by address, oldest first
        self.ended: list[str] = []  # names of members that ended though nobody killed them here
        self._askers: dict[str, AsyncClient] = {}  # by a gateway's address
        self._exit = contextlib.AsyncExitStack()

    @property
    def addresses(self) -> list[str]:
        """Of the gateways, oldest first."""
        return list(self.gateways)

    def num_cacheable(self, num_prompt_tokens: int) -> int:
        """Return the tokens of a prompt that a replica takes from its cache if it has had it."""
        size = self._config.cache.block_size
        return (num_prompt_tokens - 1) // size * size  # the last token is computed in any case

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            redis = await asyncio.to_thread(OwnRedis, niceness=0)
            stack.callback(redis.close)
            self._config = _config_of(self.layout, redis.url)
            if self._nursery is None:
                self._nursery = await asyncio.to_thread(Nursery)
                stack.callback(self._nursery.close)
            stack.push_async_callback(self._end_members)
            await self.restore()
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._exit.aclose()

    def kill_leader(self, replica_id: str) -> None:
        """End a leader as `kill -9` does."""
        self.leaders.pop(replica_id).kill()

    def kill_gateway(self, address: str) -> None:
        """End a gateway as `kill -9` does."""
        self.gateways.pop(address).kill()

    def bury(self) -> list[str]:
        """Return the names of members that have ended by themselves, and forget them."""
        dead = []
        for members in (self.leaders, self.gateways):
            for key in [key for key, member in members.items() if not member.is_running]:
                dead.append(members.pop(key).name)
        self.ended += dead
        return dead

    async def restore(self) -> None:
        """Start what is missing; return when every gateway has all leaders, and none besides.

        Raises:
            UnavailableError: Something did not start, or is not connected in time.
        """
        self.bury()
        while len(self.leaders) < self.layout.num_leaders:
            member = await self._start("leader")
            self.leaders[member.name] = member
        while len(self.gateways) < self.layout.num_gateways:
            member = await self._start("gateway")
            self.gateways[member.address] = member
        await self.wait_connected()

    async def wait_connected(self) -> None:
        """Return when each gateway routes to the leaders that run, and to no other.

        Raises:
            UnavailableError: Not in time.
        """
        for address in [address for address in self._askers if address not in self.gateways]:
            await self._askers.pop(address).close()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                for address in self.gateways:
                    while await self.ready_at(address) != set(self.leaders):  # noqa: ASYNC110
                        await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            has = await self.ready_at(address)
            raise UnavailableError(
                f"{self.gateways[address].name} has {sorted(has)} after {READY_TIMEOUT_S:g} s, not "
                f"{sorted(self.leaders)}; ended: {self.bury()}"
            ) from error

    async def ready_at(self, address: str) -> set[str]:
        """Return the ids of the replicas that a gateway routes to."""
        if address not in self._askers:
            self._askers[address] = AsyncClient(address)
        try:
            state = await self._askers[address].status()
        except SluiceError:  # it starts
            return set()
        return {replica.replica_id for replica in state.replicas if replica.state == "ready"}

    async def _start(self, role: str) -> Member:
        assert self._nursery is not None, "the context has been entered"
        order = {
            "config": self._config.model_dump(),
            "min_step_s": self.layout.min_step_s,
            "executor": self.layout.executor,
        }
        return await asyncio.to_thread(self._nursery.start, role, order)

    async def _end_members(self) -> None:
        for asker in self._askers.values():
            await asker.close()
        members = [*self.gateways.values(), *self.leaders.values()]
        for member in members:
            member.kill()
        for member in members:
            await member.wait_gone(_END_TIMEOUT_S)


def _config_of(layout: Layout, url: str) -> ClusterConfig:
    knobs: Sequence[str] = (*_KNOBS, f"store.url={url}", *layout.overrides)
    return load_config(None, list(knobs))
