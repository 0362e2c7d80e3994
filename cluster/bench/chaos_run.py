"""One run of `sluice bench chaos` against one cluster, from the quiet before to the quiet after."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import grpc

from cluster.bench.chaos_clean import why_not_clean
from cluster.bench.chaos_cluster import ChaosCluster
from cluster.bench.chaos_faults import Hands, Strike
from cluster.bench.chaos_figures import fault_figures, misses, not_done, stream_figures
from cluster.bench.chaos_gaps import FaultRecord
from cluster.bench.chaos_leaks import Inventory, inventory_leaks
from cluster.bench.chaos_load import Load, Reference, Tally, learn
from cluster.bench.chaos_memory import memory_figures, memory_leaks
from cluster.bench.chaos_network import ClientNetwork
from cluster.bench.chaos_plan import ChaosPlan
from cluster.bench.chaos_requests import catalogue
from cluster.bench.chaos_schedule import FaultQueue, PlannedFault, plan_faults
from cluster.bench.chaos_stream import Visitor
from cluster.bench.chaos_watch import Watch
from cluster.errors import SluiceError, UnavailableError
from cluster.kvstore.store import Store
from cluster.model.checkpoint import inspect_checkpoint

NUM_PATHS = 2
SETTLE_TIMEOUT_S = 120.0  # a group that was killed last is built anew
_TICK_S = 0.05


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told how a run goes."""

    tell: Callable[[str], None] = lambda text: None  # what is being done
    strike: Callable[[str], None] = lambda text: None  # a fault, as it happens
    count: Callable[[Tally, float], None] = lambda tally, seconds: None  # of the load, so far


class ChaosRun:
    """One run against one cluster.

    Args:
        plan: What to do.
        cluster: That runs.
        listener: Told how it goes.
    """

    def __init__(self, plan: ChaosPlan, cluster: ChaosCluster, listener: Listener) -> None:
        self._plan = plan
        self._cluster = cluster
        self._listener = listener
        self._zero_s = time.monotonic()
        self._faults: list[FaultRecord] = []
        self._watch = Watch(cluster, self._now)
        self._leaks: list[str] = []

    def _now(self) -> float:
        return time.monotonic() - self._zero_s

    async def run(self) -> None:
        """Do all of it."""
        host, _, port = self._cluster.address.rpartition(":")
        network = ClientNetwork(host, int(port))
        addresses = await network.start(NUM_PATHS)
        store = self._cluster.open_store()
        watching = asyncio.create_task(self._watch.run(store, self._faults))
        tasks = [watching, asyncio.create_task(self._run(network, addresses, store))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:  # the watch by itself ends with an error only
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await network.close()
            await store.close()

    async def _run(self, network: ClientNetwork, addresses: list[str], store: Store) -> None:
        plan, tell = self._plan, self._listener.tell
        tell("waiting until every gateway has every replica")
        await self._settle("before all")
        tell("asking in quiet")
        model = inspect_checkpoint(self._cluster.config.model.folder)
        self._reference = await learn(
            catalogue(plan.num_asks, seed=plan.seed, vocab_size=model.vocab_size),
            lambda asks: Visitor(addresses, asks, self._now),
            num_at_once=plan.num_streams,
            now=self._now,
        )
        await self._settle("before the load")
        self._before = await self._watch.inventory()
        await self._disturb(network, addresses, self._reference)
        tell("waiting until it is quiet again")
        self._leaks += [f"after {SETTLE_TIMEOUT_S:g} s: {held}" for held in await self._settle("")]
        self._after = await self._watch.inventory()

    async def _settle(self, when: str) -> list[str]:
        held = await self._watch.settle(SETTLE_TIMEOUT_S)
        if held and when:
            raise UnavailableError(f"the cluster is not whole and quiet {when}: {'; '.join(held)}")
        return held

    async def _disturb(
        self, network: ClientNetwork, addresses: list[str], reference: Reference
    ) -> None:
        plan, self._begin_s = self._plan, self._now()
        self._load = Load(
            Visitor(addresses, reference.asks, self._now),
            reference,
            self._faults,
            seed=plan.seed,
            now=self._now,
        )
        planned = plan_faults(
            plan.kinds, seed=plan.seed, seconds=plan.seconds, interval_s=plan.interval_s
        )
        self._queue = FaultQueue(planned, plan.interval_s / 2, plan.spared_s)
        hands = Hands(self._cluster, network)
        until_s = self._begin_s + plan.seconds
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._load.run(plan.num_streams, until_s))
            while self._now() < until_s:
                taken = self._queue.take(self._now() - self._begin_s, self._watch.look.standing)
                if taken is not None:
                    tasks.create_task(self._strike(hands, *taken))
                self._listener.count(self._load.tally, self._now() - self._begin_s)
                await asyncio.sleep(_TICK_S)
        await hands.rest()
        self._leaks += hands.not_ended
        self._load_s = self._now() - self._begin_s

    async def _strike(self, hands: Hands, planned: PlannedFault, victim: str) -> None:
        planned_s = self._begin_s + planned.at_s
        fault = FaultRecord(planned.number, planned.kind, victim, planned_s, self._now())
        self._faults.append(fault)
        try:
            await hands.bring_about(Strike(planned.kind, victim, self._watch.look))
        except grpc.aio.AioRpcError as error:
            fault.error = f"{error.code().name}: {error.details()}"
        except (OSError, SluiceError) as error:
            fault.error = f"{type(error).__name__}: {error}"
        fault.end_s = self._now()
        at_s = fault.begin_s - self._begin_s
        failed = f" failed: {fault.error}" if fault.error else ""
        self._listener.strike(f"{at_s:6.1f} s  {planned.kind.name} {victim}{failed}")

    def figures(self) -> dict[str, Any]:
        """Return what the run has shown; the cluster has ended."""
        plan, reference, outcomes = self._plan, self._reference, self._load.outcomes
        each, kinds = fault_figures(self._faults, outcomes)
        figures = {
            "plan": asdict(plan)
            | {"kinds": [kind.name for kind in plan.kinds], "spared_s": plan.spared_s},
            "model": self._cluster.config.model.served_name,
            "reference": {
                "num_asks": len(reference.asks),
                "num_unstable": reference.num_unstable,
                "seconds": reference.seconds,
            },
            "begin_s": self._begin_s,
            "load_s": self._load_s,
            "streams": stream_figures(outcomes, self._load_s),
            "faults": {
                "each": each,
                "kinds": kinds,
                "num_planned": len(self._faults) + len(self._queue.left),
                "num_waited": len(self._queue.waited),
                "num_never": len(self._queue.left),
                "not_done": not_done(self._faults, self._queue.left, self._begin_s),
            },
            "leaks": self._leak_figures(self._before, self._after),
        }
        not_clean = why_not_clean(figures)
        return figures | {
            "misses": misses(kinds),
            "not_clean": not_clean,
            "is_clean": not not_clean,
        }

    def _leak_figures(self, before: Inventory, after: Inventory) -> dict[str, Any]:
        cluster, lives = self._cluster, self._watch.lives
        load = (self._begin_s, self._begin_s + self._plan.seconds)
        found = [
            *self._leaks,
            *inventory_leaks(before, after, cluster.budget_bytes),
            *memory_leaks(lives, *load),
            *cluster.left,
        ]
        return {
            "found": found,
            "before": asdict(before),
            "after": asdict(after),
            "memory": memory_figures(lives, *load),
            "processes": [life.figures(*load) for life in lives],
        }
