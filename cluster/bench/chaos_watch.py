"""Watches the cluster while it is disturbed: who serves, and what its processes hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from cluster.bench.chaos_cluster import ChaosCluster, Look
from cluster.bench.chaos_gaps import FaultRecord
from cluster.bench.chaos_leaks import Inventory, why_not_quiet
from cluster.bench.chaos_memory import Life
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
        self._lives: dict[tuple[int, float, str], Life] = {}
        self._processes: set[tuple[int, float]] = set()  # seen so far
        self._cluster = cluster
        self._now = now

    @property
    def lives(self) -> list[Life]:
        """The memory of each process, oldest first."""
        return sorted(self._lives.values(), key=lambda life: life.born_s)

    async def run(self, store: Store, faults: list[FaultRecord]) -> None:
        """Look until cancelled; write down when the cluster was whole behind a fault."""
        due_s = 0.0
        while True:
            if self._now() >= due_s:
                self.add(await asyncio.to_thread(self._cluster.sample))
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

    def add(self, samples: Sequence[ProcessSample]) -> None:
        """Take what each process holds now."""
        now_s = self._now()
        for sample in samples:
            process = (sample.pid, sample.started_s)
            key = (*process, sample.kind)
            if key not in self._lives:
                # A process of Ray's that waits becomes somebody later: then that one is born.
                is_known = process in self._processes
                born_s = now_s if is_known else now_s - sample.age_s
                self._lives[key] = Life(sample.kind, sample.pid, born_s)
            self._processes.add(process)
            self._lives[key].add(now_s, sample.rss_bytes)

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
        return await asyncio.to_thread(self._cluster.inventory)
