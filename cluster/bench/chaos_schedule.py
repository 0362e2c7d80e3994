"""What goes wrong when in a run of `sluice bench chaos`: pure, and the same for the same seed.

    planned    |  kill-leader  |  cut-network  |  kill-gateway  |  ...      one per interval
    happens    |  kill-leader  |  cut-network  | ·············· kill-gateway
                                                 one gateway is left: it waits until all are back

Every kind comes once before any comes again. A fault never takes the last replica or the last
gateway: such a one waits until the cluster is whole, while faults of other kinds go on. In a long
run one replica and one gateway are spared at first: only what lives long shows whether it grows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.errors import InvalidArgumentError

_JITTER = 0.2  # of the interval: faults and journal writes must not keep step


class Target(StrEnum):
    """What a fault befalls."""

    REPLICA = "replica"
    GATEWAY = "gateway"
    STORE = "store"
    NETWORK = "network"  # between clients and gateways


@dataclass(frozen=True, slots=True)
class FaultKind:
    """One thing that can go wrong."""

    name: str
    target: Target
    meaning: str  # for the reader of a report
    lasts_s: float = 0.0  # then it is made good; 0: the cluster has to
    loses_journals: bool = False  # what the store knows of requests is gone
    num_workers: range = range(1, 65)  # of the groups that it can befall


KINDS = (
    FaultKind("kill-leader", Target.REPLICA, "kill -9 of a replica's leader"),
    FaultKind("stop-leader", Target.REPLICA, "SIGSTOP of a leader, never continued"),
    FaultKind(
        "kill-worker",
        Target.REPLICA,
        "kill -9 of a worker of a replica",
        num_workers=range(2, 65),  # the only one of a group is in its leader's process
    ),
    FaultKind("drain-replica", Target.REPLICA, "a replica is told to leave"),
    FaultKind("kill-gateway", Target.GATEWAY, "kill -9 of a gateway"),
    FaultKind("stop-gateway", Target.GATEWAY, "SIGSTOP of a gateway, never continued"),
    FaultKind(
        "term-gateway",
        Target.GATEWAY,
        "SIGTERM to a gateway's process: Ray ends it at once, a second kill and no drain",
    ),
    FaultKind(
        "restart-redis",
        Target.STORE,
        "kill -9 of Redis, empty again 1 s later",
        lasts_s=1.0,
        loses_journals=True,
    ),
    FaultKind("stop-redis", Target.STORE, "Redis stands still for 2 s", lasts_s=2.0),
    FaultKind("flush-redis", Target.STORE, "FLUSHALL", loses_journals=True),
    FaultKind(
        "kill-mover",
        Target.STORE,
        "kill -9 of what carries a replica's KV blocks",
        num_workers=range(1, 2),  # larger groups have none then, until they are built anew
    ),
    FaultKind("cut-network", Target.NETWORK, "all connections of clients are reset"),
    FaultKind("hole-network", Target.NETWORK, "nothing passes for 2 s, either way", lasts_s=2.0),
)


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """A fault that is to happen."""

    number: int  # in order of time, from 0
    kind: FaultKind
    at_s: float  # since the load began
    draw: float  # which one of several, in [0, 1)


@dataclass(frozen=True, slots=True)
class Standing:
    """Who serves at this moment, and how many should."""

    replica_ids: tuple[str, ...]  # that take requests, sorted
    gateway_ids: tuple[str, ...]  # likewise
    num_replicas: int
    num_gateways: int

    @property
    def is_whole(self) -> bool:
        """Whether nobody is missing."""
        has_replicas = len(self.replica_ids) >= self.num_replicas
        return has_replicas and len(self.gateway_ids) >= self.num_gateways

    def ids(self, target: Target) -> tuple[str, ...]:
        """Return whom a fault can befall; none where it is all of something at once."""
        known = {Target.REPLICA: self.replica_ids, Target.GATEWAY: self.gateway_ids}
        return known.get(target, ())


def fault_kinds(names: str, num_workers: int = 1) -> tuple[FaultKind, ...]:
    """Return the kinds of a list with commas.

    Args:
        names: Empty: all that there can be.
        num_workers: Of a group.

    Raises:
        InvalidArgumentError: There is no such kind.
    """
    known = {kind.name: kind for kind in KINDS}
    possible = [kind.name for kind in KINDS if num_workers in kind.num_workers]
    wanted = [name for name in names.split(",") if name] or possible
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise InvalidArgumentError(
            f"--faults: no fault is called {unknown[0]!r}: choose from {','.join(known)}",
            field="faults",
        )
    return tuple(kind for name, kind in known.items() if name in wanted)


def plan_faults(
    kinds: Sequence[FaultKind], *, seed: int, seconds: float, interval_s: float
) -> tuple[PlannedFault, ...]:
    """Return the faults of a run, in order of time.

    Args:
        kinds: At least one.
        seed: Of their order and their victims.
        seconds: Of the load; the last interval has none, so that what it does is seen.
        interval_s: Between two faults, on average.
    """
    randomness = random.Random(f"faults {seed}")
    bag: list[FaultKind] = []
    faults = []
    for number in range(int(seconds / interval_s) - 1):
        if not bag:
            bag = list(kinds)
            randomness.shuffle(bag)
        jitter_s = interval_s * randomness.uniform(-_JITTER, _JITTER)
        at_s = (number + 1) * interval_s + jitter_s
        faults.append(PlannedFault(number, bag.pop(), at_s, randomness.random()))
    return tuple(faults)


class FaultQueue:
    """Says which fault is to happen now.

    Args:
        faults: In order of time.
        spacing_s: Between two of them at the least, so that those that waited do not come at once.
        spared_s: So long the first one of all is no victim, by what it is.
    """

    def __init__(
        self,
        faults: Sequence[PlannedFault],
        spacing_s: float,
        spared_s: Mapping[Target, float] | None = None,
    ) -> None:
        self.waited: set[int] = set()  # numbers of those that had to
        self._left = list(faults)
        self._spacing_s = spacing_s
        self._last_s = -spacing_s
        self._spared_s = spared_s or {}
        self._spared: dict[Target, str] = {}  # ids

    @property
    def left(self) -> tuple[PlannedFault, ...]:
        """Those that have not happened, in order of time."""
        return tuple(self._left)

    def take(self, now_s: float, standing: Standing) -> tuple[PlannedFault, str] | None:
        """Return the fault that happens now and whom it befalls ("": no one in particular)."""
        if now_s - self._last_s < self._spacing_s:
            return None
        for fault in self._left:
            if fault.at_s > now_s:
                return None
            if not self._may_happen(fault, standing):
                self.waited.add(fault.number)
                continue
            self._left.remove(fault)
            self._last_s = now_s
            ids = self._victims(fault.kind.target, standing, now_s)
            return fault, ids[int(fault.draw * len(ids))] if ids else ""
        return None

    def _victims(self, target: Target, standing: Standing, now_s: float) -> list[str]:
        ids = list(standing.ids(target))
        if ids and now_s < self._spared_s.get(target, 0.0):
            spared = self._spared.setdefault(target, ids[0])
            return [name for name in ids if name != spared]
        return ids

    def _may_happen(self, fault: PlannedFault, standing: Standing) -> bool:
        if fault.kind.target not in (Target.REPLICA, Target.GATEWAY):
            return True
        if fault.number in self.waited and not standing.is_whole:
            return False
        return len(standing.ids(fault.kind.target)) > 1
