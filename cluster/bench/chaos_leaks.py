"""What a run of `sluice bench chaos` has left behind: pure.

A fresh process is no leak: faults make them. What counts is what there is more of than before,
when the cluster is whole and quiet again. Memory is in chaos_memory.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.client import ClusterState

COUNTED_KINDS = ("gateway", "leader", "worker", "mover", "guardian")


@dataclass(frozen=True, slots=True)
class Inventory:
    """What there is of the cluster at one moment."""

    num_processes: Mapping[str, int]  # by kind
    num_ports: int  # that its processes listen on
    shared_names: tuple[str, ...]  # of its files in shared memory, sorted
    redis_bytes: int  # that Redis says it uses


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
