"""What faults of the store cost the requests that run: `sluice bench store --faults`.

    replica without tiers   answers of the catalogue, rate, one phase of the load
    replica with a store    undisturbed ─► fault ─► recovery ─► undisturbed ─► next fault ─► ...
                                           begins   ends; until reads and writes work and hits come

The phase without tiers shows what it costs to compute everything, which is the most that a store
may cost when it is gone; and how many answers differ there for no other reason than who is in the
batch: with the roundings of bf16 some do, in float32 none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from cluster.bench.statistics import percentile
from cluster.bench.store_fault_kinds import Fault
from cluster.bench.store_open_load import Catalogue, OpenLoad, Phase
from cluster.bench.store_replica import Replica, SharedModel
from cluster.clock import WallClock
from cluster.types import StoreState

MAX_RECOVERY_S = 15.0
WITHOUT_PHASES = 3  # in length
RATE_SHARE = 0.8  # of what the engine serves without any tier


@dataclass(frozen=True, slots=True)
class FaultLoad:
    """The load under which things go wrong."""

    num_streams: int = 16  # about; half as many again are the most
    num_requests: int = 96  # of the catalogue
    prompt_tokens: int = 256
    answer_tokens: int = 192
    phase_s: float = 8.0
    minutes: float = 0.0  # the faults are repeated for so long; 0: once

    @property
    def num_tokens(self) -> int:
        """Of one request, prompt and answer."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def max_at_once(self) -> int:
        """Streams, at the most."""
        return self.num_streams + self.num_streams // 2

    def num_blocks(self, block_size: int) -> int:
        """Return KV blocks for the streams and a few more: what is asked again is mostly gone."""
        return (self.max_at_once + 4) * -(-self.num_tokens // block_size)

    def num_slots(self, block_size: int) -> int:
        """Return slots for a sixth of the catalogue: the rest is in the store alone."""
        return self.num_requests * (self.prompt_tokens // block_size) // 6


class FaultBench:
    """One measurement.

    Args:
        model: Of the replicas.
        load: What they are given.
        faults: What goes wrong, one after the other.
        seed: Of the prompts.
        on_progress: Told what is being done.
    """

    def __init__(
        self,
        model: SharedModel,
        load: FaultLoad,
        faults: list[Fault],
        *,
        seed: int,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self._model = model
        self._load = load
        self._faults = faults
        self._on_progress = on_progress
        self._catalogue = Catalogue(
            load.num_requests,
            prompt_tokens=load.prompt_tokens,
            answer_tokens=load.answer_tokens,
            vocab_size=model.info.vocab_size,
            seed=seed,
        )
        self._undisturbed: list[Phase] = []
        self._disturbed: dict[str, list[Phase]] = {fault.name: [] for fault in faults}
        self._around: dict[str, list[Phase]] = {fault.name: [] for fault in faults}
        self._recoveries: dict[str, list[Phase]] = {fault.name: [] for fault in faults}
        self._recovery_s: dict[str, list[float | None]] = {fault.name: [] for fault in faults}

    def run(self) -> dict[str, Any]:
        """Return the figures of all phases.

        Raises:
            SluiceError: Already the replica without a store failed.
        """
        self._on_progress("faults: without a store", 0, len(self._faults))
        rate_per_s = self._learn()
        alone = self._open_load(self._replica(has_tiers=False), rate_per_s)
        without = alone.run("without a store", WITHOUT_PHASES * self._load.phase_s)
        alone.finish()
        replica = self._replica(has_tiers=True)
        replica.run(self._catalogue.requests, max_at_once=self._load.max_at_once)
        replica.settle()  # the whole catalogue is in the store
        load = self._open_load(replica, rate_per_s)
        self._undisturbed.append(load.run("undisturbed", self._load.phase_s))
        rss = [self._rss_bytes()]
        began_s, num_done = time.monotonic(), 0
        with ThreadPoolExecutor(1) as hands:
            while not num_done or time.monotonic() < began_s + 60 * self._load.minutes:
                for index, fault in enumerate(self._faults):
                    self._on_progress(f"faults: {fault.name}", index, len(self._faults))
                    self._disturb(fault, load, replica, hands)
                num_done += 1
                rss.append(self._rss_bytes())
        last = load.finish()
        return {
            "load": asdict(self._load),
            "rate_per_s": rate_per_s,
            "num_cycles": num_done,
            "seconds": time.monotonic() - began_s,
            "without_store": phase_figures([without]),
            "undisturbed": phase_figures(self._undisturbed),
            "faults": [self._fault_figures(fault.name) for fault in self._faults],
            "num_failed": self._sum("num_failed") + last.num_failed,
            "num_requests": self._sum("num_ended") + last.num_ended,
            "num_different": self._sum("num_different") + last.num_different,
            "rss_bytes": rss,
            "cache": asdict(replica.cache),
        }

    def _learn(self) -> float:
        """Compute what each request must answer; return the rate of the load."""
        replica = self._replica(has_tiers=False)
        requests, num_at_once = self._catalogue.requests, self._load.max_at_once
        replica.run(requests[:num_at_once])  # warms up
        replica.outputs.clear()
        start_s = time.monotonic()
        replica.run(requests, max_at_once=num_at_once)
        wall_s = time.monotonic() - start_s
        self._catalogue.learn(replica.outputs)
        return RATE_SHARE * len(requests) / wall_s

    def _open_load(self, replica: Replica, rate_per_s: float) -> OpenLoad:
        return OpenLoad(
            replica,
            self._catalogue,
            rate_per_s=rate_per_s,
            max_at_once=self._load.max_at_once,
            clock=WallClock(),
        )

    def _replica(self, *, has_tiers: bool) -> Replica:
        size = self._model.config.cache.block_size
        return self._model.replica(
            num_blocks=self._load.num_blocks(size),
            num_slots=self._load.num_slots(size),
            has_tiers=has_tiers,
            caches=has_tiers,
        )

    def _disturb(
        self, fault: Fault, load: OpenLoad, replica: Replica, hands: ThreadPoolExecutor
    ) -> None:
        """Let one thing go wrong, and make it good again; another thread has its hands on Redis."""
        begun = hands.submit(fault.begin)
        self._disturbed[fault.name].append(load.run(fault.name, self._load.phase_s))
        begun.result()
        ended = hands.submit(fault.end)
        num_fetched: int | None = None

        def is_well() -> bool:
            nonlocal num_fetched
            if not ended.done():
                return False
            cache = replica.cache
            if num_fetched is None:
                num_fetched = cache.num_fetched_blocks
            is_exact = cache.store_state is StoreState.EXACT
            return is_exact and cache.num_fetched_blocks > num_fetched

        recovery = load.run(f"recovery from {fault.name}", MAX_RECOVERY_S, is_well)
        ended.result()
        self._recoveries[fault.name].append(recovery)
        is_recovered = recovery.seconds < MAX_RECOVERY_S
        self._recovery_s[fault.name].append(recovery.seconds if is_recovered else None)
        self._undisturbed.append(load.run("undisturbed", self._load.phase_s))
        self._around[fault.name] += self._undisturbed[-2:]

    def _fault_figures(self, name: str) -> dict[str, Any]:
        figures = phase_figures(self._disturbed[name])
        base = phase_figures(self._around[name])  # before and after: a machine drifts
        known = [s for s in self._recovery_s[name] if s is not None]
        return {
            "name": name,
            **figures,
            "undisturbed_tpot_p99_s": base["tpot_p99_s"],
            "tpot_p99_growth": growth(figures["tpot_p99_s"], base["tpot_p99_s"]),
            "recovery_s": max(known, default=None),
            "num_not_recovered": len(self._recovery_s[name]) - len(known),
        }

    def _sum(self, name: str) -> int:
        return sum(int(getattr(phase, name)) for phase in self._phases())

    def _phases(self) -> list[Phase]:
        groups = [self._undisturbed, *self._disturbed.values(), *self._recoveries.values()]
        return [phase for group in groups for phase in group]

    def _rss_bytes(self) -> dict[str, int]:
        pid = self._model.mover_pid
        found = {"engine": psutil.Process().memory_info().rss}
        if pid is not None:
            found["mover"] = psutil.Process(pid).memory_info().rss
        return found


def growth(value_s: float | None, base_s: float | None) -> float | None:
    """Return by what share a time has grown; None where one of the two is not known."""
    return None if value_s is None or base_s is None else value_s / base_s - 1


def phase_figures(phases: list[Phase]) -> dict[str, Any]:
    """Return the figures of phases of one kind, their requests taken together."""
    tpot_s = [value for phase in phases for value in phase.tpot_s]
    gaps_s = [value for phase in phases for value in phase.gaps_s]
    ttft_s = [value for phase in phases for value in phase.ttft_s]
    running = [float(value) for phase in phases for value in phase.num_running]
    return {
        "num_requests": sum(phase.num_ended for phase in phases),
        "num_streams": len(tpot_s),
        "tpot_p50_s": percentile(tpot_s, 50),
        "tpot_p99_s": percentile(tpot_s, 99),
        "gap_p99_s": percentile(gaps_s, 99),
        "ttft_p50_s": percentile(ttft_s, 50),
        "ttft_p99_s": percentile(ttft_s, 99),
        "streams_p50": percentile(running, 50),
        "num_failed": sum(phase.num_failed for phase in phases),
        "num_different": sum(phase.num_different for phase in phases),
    }
