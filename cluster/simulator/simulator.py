"""Virtual time over the real engine, router, admission and autoscaler.

    arrival ──► gateway: Dispatcher ──event_delay──► replica: Engine ──step──► tokens
                    ▲                                      │
                    └───────event_delay: blocks, load──────┘

Every event is a call at a time; those of one time come in the order in which they were made, so one
seed gives one log. Gateways decide on what has reached them by then, as in production.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable
from itertools import count

from cluster.autoscaler.policy import ScalingPolicy
from cluster.simulator.arrival import Arrival
from cluster.simulator.gateway import SimulatedGateway
from cluster.simulator.record import End, ReplicaRecord, RequestRecord, SimulationResult
from cluster.simulator.replica import SimulatedReplica
from cluster.simulator.settings import Fault, SimulationSettings
from cluster.simulator.workload import Workload
from cluster.types import EngineOutput

_SAMPLE_S = 1.0  # between two looks at the load, for the report
_PROGRESS_EVENTS = 4096


class Simulator:
    """One simulation.

    Args:
        workload: What arrives.
        settings: The cluster.
    """

    def __init__(self, workload: Workload, settings: SimulationSettings) -> None:
        self.now_s = 0.0
        self.settings = settings
        self.replicas: dict[str, SimulatedReplica] = {}  # that run, by id
        self.records: dict[str, RequestRecord] = {}
        self._workload = workload
        self._rng = random.Random(settings.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = count()
        self._replica_serial = count()
        self._ended: list[ReplicaRecord] = []
        self._followers: dict[str, list[Arrival]] = {}
        self._num_open = 0  # arrivals that have not ended
        self._num_starting = 0
        self._slots: dict[int, str] = {}  # of the first replicas, that faults name
        self._sizes: list[tuple[float, int]] = []
        self._load: list[tuple[float, int, int, int]] = []
        self.gateways = [
            SimulatedGateway(self, index, random.Random(self._rng.getrandbits(64)))
            for index in range(settings.num_gateways)
        ]

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        """Have something happen, not before now."""
        heapq.heappush(self._events, (max(when_s, self.now_s), next(self._serial), call))

    def later(self, call: Callable[[], None]) -> None:
        """Have something happen one event delay from now."""
        self.at(self.now_s + self.settings.event_delay_s, call)

    def run(self, on_progress: Callable[[float], None] | None = None) -> SimulationResult:
        """Return what happened.

        Args:
            on_progress: Told the virtual time now and then, seconds.
        """
        began_s = time.perf_counter()
        self._prepare()
        num_events = 0
        while self._events and self._num_open:
            when_s, _, call = heapq.heappop(self._events)
            if when_s > self.settings.max_duration_s:
                break
            self.now_s = when_s
            call()
            num_events += 1
            if on_progress is not None and num_events % _PROGRESS_EVENTS == 0:
                on_progress(self.now_s)
        return self._result(time.perf_counter() - began_s)

    def _prepare(self) -> None:
        settings = self.settings
        num_replicas = settings.num_replicas
        for index in range(num_replicas):
            self._slots[index] = self._start_replica(index)
        for arrival in self._workload.arrivals:
            self._num_open += 1
            if arrival.follows:
                self._followers.setdefault(arrival.follows, []).append(arrival)
            else:
                self._expect(arrival, arrival.arrived_s)
        for fault in settings.faults:
            self._inject(fault)
        self.at(0.0, self._sample)
        if settings.autoscaling is not None:
            self._policy = ScalingPolicy(settings.autoscaling)
            self._target = num_replicas
            self.at(0.0, self._scale)

    # ---- requests

    def _expect(self, arrival: Arrival, when_s: float) -> None:
        gateway = self.gateways[len(self.records) % len(self.gateways)]
        record = RequestRecord(arrival, when_s, gateway=gateway.index)
        self.records[arrival.request_id] = record
        self.at(when_s, lambda: gateway.arrive(record))

    def ended(self, record: RequestRecord, end: End, reason: str = "") -> None:
        """Note that a request has ended; those that follow it come when their time is over."""
        record.end, record.reason = end, reason
        self._num_open -= 1
        for arrival in self._followers.pop(record.arrival.request_id, ()):
            self._expect(arrival, self.now_s + arrival.arrived_s)

    # ---- replicas

    def wake(self, replica: SimulatedReplica) -> None:
        """Begin a step unless one is under way."""
        if not replica.is_stepping and not replica.is_dead and replica.has_work:
            self._step(replica)

    def _step(self, replica: SimulatedReplica) -> None:
        replica.is_stepping = True
        end_s, outputs = replica.step(self.now_s)
        self.at(end_s, lambda: self._end_step(replica, outputs))

    def _end_step(self, replica: SimulatedReplica, outputs: list[EngineOutput]) -> None:
        if replica.is_dead:
            return
        replica.is_stepping = False
        added, removed = replica.block_events()
        load = None
        if self.now_s >= replica.load_due_s:
            load = replica.load()
            replica.load_due_s = self.now_s + self.settings.config.replica.load_interval_s
        if outputs or added or removed or load is not None:
            replica_id = replica.info.replica_id
            for gateway in self.gateways:
                gateway.hear(replica_id, outputs, added, removed, load)
        if replica.has_work:
            self._step(replica)
        elif replica.is_draining and not replica.num_requests:
            self._end_replica(replica)
        else:
            self.at(replica.load_due_s, lambda: self._report_idle(replica))

    def _report_idle(self, replica: SimulatedReplica) -> None:
        """Report once that there is nothing to do: a leader repeats it, a simulation need not."""
        if replica.is_dead or replica.is_stepping:
            return
        load = replica.load()
        replica.load_due_s = self.now_s + self.settings.config.replica.load_interval_s
        for gateway in self.gateways:
            # Twice: what was sent before the report before is in it, and then it is forgotten.
            gateway.hear(replica.info.replica_id, [], [], [], load)
            gateway.hear(replica.info.replica_id, [], [], [], load)

    def _start_replica(self, index: int | None = None) -> str:
        settings = self.settings
        replica_id = f"replica-{next(self._replica_serial):04d}"
        slowness = 1.0
        if index is not None and index < len(settings.replica_slowness):
            slowness = settings.replica_slowness[index]
        replica = SimulatedReplica(
            replica_id,
            settings,
            slowness=slowness,
            rng=random.Random(self._rng.getrandbits(64)),
            now_s=self.now_s,
        )
        self.replicas[replica_id] = replica
        self._note_size()
        for gateway in self.gateways:
            gateway.connect(replica)
        return replica_id

    def _end_replica(self, replica: SimulatedReplica) -> None:
        replica_id = replica.info.replica_id
        replica.is_dead = True
        del self.replicas[replica_id]
        self._ended.append(replica.close(self.now_s))
        self._note_size()
        for gateway in self.gateways:
            gateway.lose(replica)

    def _note_size(self) -> None:
        num_serving = sum(not replica.is_draining for replica in self.replicas.values())
        self._sizes.append((self.now_s, num_serving))

    # ---- faults and scaling

    def _inject(self, fault: Fault) -> None:
        def begin() -> None:
            replica = self.replicas.get(self._slots[fault.replica])
            if replica is None:
                return
            if fault.slowness is not None:
                replica.set_slowness(fault.slowness)
                if fault.duration_s is not None:
                    self.at(self.now_s + fault.duration_s, lambda: replica.set_slowness(1.0))
                return
            self._end_replica(replica)
            if fault.duration_s is not None:
                self.at(self.now_s + fault.duration_s, replace_it)

        def replace_it() -> None:
            self._slots[fault.replica] = self._start_replica()

        self.at(fault.at_s, begin)

    def _scale(self) -> None:
        scaling = self.settings.autoscaling
        assert scaling is not None
        load = sum(gateway.num_queued for gateway in self.gateways)
        load += sum(replica.num_requests for replica in self.replicas.values())
        self._target = self._policy.decide(self.now_s, self._target, load)
        serving = [replica for replica in self.replicas.values() if not replica.is_draining]
        missing = self._target - len(serving) - self._num_starting
        for _ in range(missing):
            self._num_starting += 1
            self.at(self.now_s + self.settings.start_s, self._started)
        for replica in sorted(serving, key=lambda r: r.num_requests)[: max(0, -missing)]:
            replica.is_draining = True
            self._note_size()
            load_now = replica.load()
            for gateway in self.gateways:
                gateway.hear(replica.info.replica_id, [], [], [], load_now)
            if not replica.is_stepping and not replica.num_requests:
                self._end_replica(replica)
        self.at(self.now_s + scaling.metrics_interval_s, self._scale)

    def _started(self) -> None:
        self._num_starting -= 1
        self._start_replica()

    # ---- the end

    def _sample(self) -> None:
        loads = [replica.engine.load() for replica in self.replicas.values()]
        self._load.append(
            (
                self.now_s,
                sum(gateway.num_queued for gateway in self.gateways),
                sum(load.num_waiting for load in loads),
                sum(load.num_running for load in loads),
            )
        )
        self.at(self.now_s + _SAMPLE_S, self._sample)

    def _result(self, wall_s: float) -> SimulationResult:
        settings = self.settings
        records = [*self._ended, *(replica.close(None) for replica in self.replicas.values())]
        return SimulationResult(
            policy=settings.config.router.policy,
            seed=settings.seed,
            workload=self._workload.name,
            rate_scale=1.0,
            duration_s=self.now_s,
            wall_s=wall_s,
            requests=sorted(self.records.values(), key=lambda record: record.arrived_s),
            replicas=sorted(records, key=lambda record: record.replica_id),
            num_gateways=len(self.gateways),
            num_replicas_over_time=self._sizes,
            load_over_time=self._load,
            settings=dict(settings.extra),
        )


def simulate(
    workload: Workload,
    settings: SimulationSettings,
    on_progress: Callable[[float], None] | None = None,
) -> SimulationResult:
    """Return what becomes of a workload.

    Args:
        workload: At the rate at which it is to come.
        settings: The cluster.
        on_progress: Told the virtual time now and then, seconds.
    """
    return Simulator(workload, settings).run(on_progress)
