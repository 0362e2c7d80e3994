"""What a run of `sluice bench chaos` has left behind: pure.

A fresh process is no leak: faults make them. What counts is what there is more of than before,
when the cluster is whole and quiet again, and memory of one process that grows and grows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.client import ClusterState

MIB = 2**20
WARM_UP_S = 60.0  # caches and pools fill
MIN_FIT_S = 90.0  # of a life behind it; a slope of less says nothing
MAX_GROWTH_BYTES_PER_MIN = 4 * MIB
COUNTED_KINDS = ("gateway", "leader", "worker", "mover", "guardian")


@dataclass(frozen=True, slots=True)
class Inventory:
    """What there is of the cluster at one moment."""

    num_processes: Mapping[str, int]  # by kind
    num_ports: int  # that its processes listen on
    shared_names: tuple[str, ...]  # of files in shared memory that they map, sorted
    redis_bytes: int  # that Redis says it uses


@dataclass(slots=True)
class Life:
    """The memory of one process over its life; seconds since the run began."""

    kind: str
    pid: int
    times_s: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)

    def add(self, time_s: float, rss_bytes: int) -> None:
        """Take one more sample."""
        self.times_s.append(time_s)
        self.rss_bytes.append(rss_bytes)

    def growth_bytes_per_min(self) -> float | None:
        """Return the slope behind the warm-up by least squares; None for too short a life."""
        begin_s = self.times_s[0] + WARM_UP_S
        points = [(s, b) for s, b in zip(self.times_s, self.rss_bytes, strict=True) if s >= begin_s]
        if not points or points[-1][0] - points[0][0] < MIN_FIT_S:
            return None
        times_s, rss_bytes = np.array(points, dtype=float).T
        return float(np.polyfit(times_s, rss_bytes, 1)[0] * 60.0)

    def figures(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return {
            "kind": self.kind,
            "pid": self.pid,
            "seconds": self.times_s[-1] - self.times_s[0],
            "first_bytes": self.rss_bytes[0],
            "last_bytes": self.rss_bytes[-1],
            "growth_bytes_per_min": self.growth_bytes_per_min(),
        }


def inventory_leaks(before: Inventory, after: Inventory, max_redis_bytes: int) -> list[str]:
    """Return what there is more of than before, in words.

    Args:
        before: Whole and quiet.
        after: Likewise.
        max_redis_bytes: All budgets of the store together.
    """
    found = []
    for kind in COUNTED_KINDS:
        was, is_now = before.num_processes.get(kind, 0), after.num_processes.get(kind, 0)
        if is_now > was:
            found.append(f"{is_now} {kind} processes, {was} before")
    if after.num_ports > before.num_ports:
        found.append(f"{after.num_ports} ports are listened on, {before.num_ports} before")
    if len(after.shared_names) > len(before.shared_names):
        new = sorted(set(after.shared_names) - set(before.shared_names))
        found.append(f"in shared memory: {', '.join(new)}")
    if after.redis_bytes > before.redis_bytes + max_redis_bytes:
        found.append(f"Redis has {after.redis_bytes} bytes, its budgets are {max_redis_bytes}")
    return found


def memory_leaks(lives: Sequence[Life]) -> list[str]:
    """Return which processes grow beyond what is allowed, in words."""
    found = []
    for life in lives:
        growth = life.growth_bytes_per_min()
        if growth is not None and growth > MAX_GROWTH_BYTES_PER_MIN:
            found.append(f"{life.kind} {life.pid} grows by {growth / MIB:.1f} MiB a minute")
    return found


def why_not_quiet(
    states: Sequence[ClusterState], num_gateways: int, num_replicas: int
) -> list[str]:
    """Return who is missing and what is still held, in words; nothing where all is quiet.

    Args:
        states: As each gateway that answers sees the cluster.
        num_gateways: That should.
        num_replicas: That each of them should reach.
    """
    found = []
    if len(states) < num_gateways:
        found.append(f"{len(states)} of {num_gateways} gateways answer")
    for state in states:
        num_ready = sum(replica.state == "ready" for replica in state.replicas)
        if num_ready != num_replicas:
            found.append(f"gateway {state.gateway_id} has {num_ready} of {num_replicas} replicas")
        for name in ("num_inflight", "num_queued"):
            if value := getattr(state, name):
                found.append(f"{name} of gateway {state.gateway_id} is {value}")
    for replica in states[0].replicas if states else ():
        if num_held := replica.num_running + replica.num_waiting:
            found.append(f"replica {replica.replica_id} has {num_held} requests")
        if num_blocks := replica.num_blocks - replica.num_free_blocks:
            found.append(f"replica {replica.replica_id} holds {num_blocks} KV blocks")
    return found
