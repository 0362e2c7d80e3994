"""Watches the cluster while it is disturbed: who serves, and what its processes hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.bench.chaos_cluster import ChaosCluster, Look
from cluster.bench.chaos_gaps import FaultRecord
from cluster.bench.chaos_leaks import Inventory, Life, why_not_quiet
from cluster.bench.chaos_processes import ProcessSample
from cluster.bench.chaos_schedule import Standing
from cluster.kvstore.store import Store

LOOK_INTERVAL_S = 0.5
SAMPLE_INTERVAL_S = 2.0
SETTLE_S = 3.0  # counters and processes of the last requests


class Watch:
    """Keeps looking.

    Args:
        cluster: To look at.
        now: Seconds since the run began.
    """

    def __init__(self, cluster: ChaosCluster, now: Callable[[], float]) -> None:
        self.look = Look(Standing((), (), 1, 1), {}, {})
        self.shared_names: set[str] = set()  # ever mapped
        self._lives: dict[tuple[int, float], Life] = {}
        self._cluster = cluster
        self._now = now

    @property
    def lives(self) -> list[Life]:
        """The memory of each process, oldest first."""
        return list(self._lives.values())

    async def run(self, store: Store, faults: list[FaultRecord]) -> None:
        """Look until cancelled; write down when the cluster was whole behind a fault."""
        due_s = 0.0
        while True:
            if self._now() >= due_s:
                self._add(await asyncio.to_thread(self._cluster.family.sample))
                due_s = self._now() + SAMPLE_INTERVAL_S
            begin_s = self._now()
            self.look = await self._cluster.look(store)
            for fault in faults:
                if fault.whole_s is None and self._is_over(fault, begin_s):
                    fault.whole_s = self._now()
            await asyncio.sleep(LOOK_INTERVAL_S)

    def _is_over(self, fault: FaultRecord, look_s: float) -> bool:
        """Return whether a look that began at `look_s` shows a whole cluster without the victim."""
        if fault.end_s is None or look_s < fault.end_s or not self.look.standing.is_whole:
            return False
        return fault.victim not in self.look.standing.ids(fault.kind.target)

    def _add(self, samples: list[ProcessSample]) -> None:
        for sample in samples:
            key = (sample.pid, sample.started_s)
            life = self._lives.setdefault(key, Life(sample.kind, sample.pid))
            life.kind = sample.kind  # a process of Ray's becomes somebody later
            life.add(self._now(), sample.rss_bytes)

    async def settle(self, timeout_s: float) -> list[str]:
        """Wait until the cluster is whole and quiet; return what was still held at the end.

        Args:
            timeout_s: At the most.
        """
        config = self._cluster.config
        wanted = (config.gateway.num_replicas, config.replica.num_replicas)
        deadline_s = self._now() + timeout_s
        while True:
            found = why_not_quiet(await self._cluster.statuses(), *wanted)
            if not self.look.standing.is_whole:
                found.append("replicas or gateways are missing")
            if not found or self._now() > deadline_s:
                return found
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def inventory(self) -> Inventory:
        """Return what there is now; the cluster is quiet."""
        await asyncio.sleep(SETTLE_S)
        found = await asyncio.to_thread(self._cluster.inventory)
        self.shared_names |= set(found.shared_names)
        return found
