"""All leaders that this gateway knows: found through the store, kept through their connections."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from cluster.config import ReplicaConfig
from cluster.errors import SluiceError, UnavailableError
from cluster.gateway.leader_link import LeaderLink, WatchCounts
from cluster.kvstore.registry import Registry
from cluster.kvstore.store import Store
from cluster.router.dispatcher import Dispatcher
from cluster.router.plausible import check_info
from cluster.types import ReplicaInfo

logger = logging.getLogger(__name__)

GATEWAY_LEASES = "gateway"
"""Kind of the leases by which gateways know of each other."""

_POLL_INTERVAL_S = 0.25


class Fleet:
    """Links to the leaders; those that can be routed to are in the dispatcher's table and index.

    The store may fail: a leader that is connected stays, whatever the store says of it.

    Args:
        config: Of the replicas.
        store: Where they are registered; stays the caller's.
        dispatcher: Routes to them, beside those of other gateways.
        gateway_id: Of this gateway, as in its lease.
        on_change: Called when a replica has come, gone, begun or ended to drain.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        store: Store,
        dispatcher: Dispatcher,
        *,
        gateway_id: str = "",
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.table = dispatcher.table
        self.index = dispatcher.index
        self.watch_counts = WatchCounts()
        self._tell = on_change
        self._dispatcher = dispatcher
        self._store = store
        self._gateway_id = gateway_id
        self._peers: list[str] = []
        self._silence_s = config.heartbeat_timeout_s
        self._registry = Registry(store)
        self._links: dict[str, LeaderLink] = {}
        self._quarantined: set[str] = set()  # ids of replicas that cannot be what they say
        self._changed = asyncio.Event()
        self._is_store_up = True
        self._store_failed_s = -math.inf  # when it did last, by time.monotonic()
        self._is_stopped = False
        self._task: asyncio.Task[None] | None = None

    @property
    def links(self) -> list[LeaderLink]:
        """All links, connected or not, ordered by replica id."""
        return [link for _, link in sorted(self._links.items())]

    @property
    def has_peers(self) -> bool:
        """Whether there are other gateways, as far as is known."""
        return any(gateway_id != self._gateway_id for gateway_id in self._peers)

    @property
    def store_up_s(self) -> float:
        """For how long the store has answered this gateway, seconds; infinite: at all times."""
        return time.monotonic() - self._store_failed_s

    def start(self) -> None:
        """Begin to look for leaders."""
        self._task = asyncio.create_task(self._poll(), name="fleet")

    async def stop(self) -> None:
        """Close all connections; all requests at replicas end."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await asyncio.gather(*(link.stop() for link in self._links.values()))
        self._links.clear()
        self._on_change()

    def link(self, replica_id: str) -> LeaderLink | None:
        """Return the link to a replica, if it is known."""
        return self._links.get(replica_id)

    def is_draining(self, replica_id: str) -> bool:
        """Return whether a replica is there and takes no new requests."""
        row = self.table.row_of(replica_id)
        return row is not None and not self.table.column("is_open")[row]

    async def wait_change(self, timeout_s: float | None) -> None:
        """Return when a replica has come, gone, begun or ended to drain.

        Raises:
            TimeoutError: Nothing of that happened in `timeout_s` seconds.
            UnavailableError: This gateway is shutting down: nothing of that will happen.
        """
        if self._is_stopped:
            raise UnavailableError("this gateway is shutting down: connect again")
        await asyncio.wait_for(self._changed.wait(), timeout_s)

    def _on_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._tell()

    async def _poll(self) -> None:
        while True:
            try:
                await self._reconcile()
            except Exception:
                logger.exception("looking for replicas failed")
            await asyncio.sleep(_POLL_INTERVAL_S)

    def _meet_peers(self, gateway_ids: list[str]) -> None:
        """Take this gateway's place among those that have a lease."""
        if gateway_ids != self._peers and self._gateway_id in gateway_ids:
            self._peers = gateway_ids
            self._dispatcher.set_peers(gateway_ids.index(self._gateway_id), len(gateway_ids))

    async def _reconcile(self) -> None:
        try:
            infos = await self._registry.list()
            self._meet_peers([*await self._store.list_leases(GATEWAY_LEASES)])
        except SluiceError as error:
            if self._is_store_up:
                logger.warning("store: %s; known replicas are kept", error)
            self._is_store_up = False
            self._store_failed_s = time.monotonic()
            return
        self._is_store_up = True
        leased = {info.replica_id for info in infos}
        self._quarantined &= leased
        for info in infos:
            if info.replica_id not in self._links and self._is_plausible(info):
                self._links[info.replica_id] = LeaderLink(
                    info,
                    table=self.table,
                    index=self.index,
                    silence_s=self._silence_s,
                    on_change=self._on_change,
                    counts=self.watch_counts,
                )
        for replica_id in [*self._links]:
            if replica_id not in leased and not self._links[replica_id].is_connected:
                await self._links.pop(replica_id).stop()

    def _is_plausible(self, info: ReplicaInfo) -> bool:
        """Return whether a replica may be connected; one that may not is told of once."""
        reason = check_info(info)
        if reason is None:
            self._quarantined.discard(info.replica_id)
        elif info.replica_id not in self._quarantined:
            self._quarantined.add(info.replica_id)
            self.watch_counts.num_quarantines += 1
            logger.warning("replica %.80r is left out, its lease says %s", info.replica_id, reason)
        return reason is None
