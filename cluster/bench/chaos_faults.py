"""Brings faults about, and makes good those that do not end by themselves."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc
from redis import Redis

from cluster.bench.chaos_cluster import ChaosCluster, Look
from cluster.bench.chaos_network import ClientNetwork
from cluster.bench.chaos_schedule import FaultKind
from cluster.rpc.sluice.v1.inference_pb2 import DrainReplicaRequest
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

CALL_TIMEOUT_S = 5.0
STOPPED_GRACE_S = 2.5
"""Who stands still may be there for so long behind the heartbeat timeout: at that a guardian ends
it, on a machine that is busy."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault, as it happens."""

    kind: FaultKind
    victim: str  # id of a replica or gateway; empty: no one in particular
    look: Look  # at the cluster, the last before it


class Hands:
    """What lays hands on the cluster.

    Args:
        cluster: To disturb.
        network: Between clients and gateways.
    """

    def __init__(self, cluster: ChaosCluster, network: ClientNetwork) -> None:
        self.not_ended: list[str] = []  # who was stopped, and was still there when time was over
        self._cluster = cluster
        self._network = network
        self._acts: dict[str, Callable[[Strike], Awaitable[None]]] = {
            "kill-leader": self._kill_leader,
            "stop-leader": self._stop_leader,
            "kill-worker": self._kill_worker,
            "drain-replica": self._drain,
            "kill-gateway": self._kill_gateway,
            "stop-gateway": self._stop_gateway,
            "term-gateway": self._end_gateway,
            "restart-redis": self._restart_redis,
            "stop-redis": self._stop_redis,
            "flush-redis": self._flush_redis,
            "kill-mover": self._kill_mover,
            "cut-network": self._cut,
            "hole-network": self._hole,
        }
        self._stopped: set[asyncio.Task[None]] = set()

    async def bring_about(self, strike: Strike) -> None:
        """Let something go wrong; returns when it is made good, or the cluster has to.

        Raises:
            OSError: The victim has ended meanwhile.
            grpc.aio.AioRpcError: The cluster refused.
            SluiceError: Redis did not start again.
        """
        await self._acts[strike.kind.name](strike)

    async def rest(self) -> None:
        """Wait for what is still being watched."""
        await asyncio.gather(*self._stopped)

    async def _kill_leader(self, strike: Strike) -> None:
        self._cluster.family.signal(strike.look.leader_pids[strike.victim], signal.SIGKILL)

    async def _stop_leader(self, strike: Strike) -> None:
        pid = strike.look.leader_pids[strike.victim]
        self._stop("leader", pid, self._cluster.config.replica.heartbeat_timeout_s)

    def _stop(self, name: str, pid: int, timeout_s: float) -> None:
        self._cluster.family.signal(pid, signal.SIGSTOP)
        watch = asyncio.create_task(self._watch_stopped(name, pid, timeout_s + STOPPED_GRACE_S))
        self._stopped.add(watch)
        watch.add_done_callback(self._stopped.discard)

    async def _watch_stopped(self, name: str, pid: int, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)
        try:
            self._cluster.family.signal(pid, signal.SIGKILL)
        except ProcessLookupError:  # as it should be
            return
        self.not_ended.append(f"{name} {pid} was stopped, and still there after {timeout_s:g} s")

    async def _kill_worker(self, strike: Strike) -> None:
        family, leader_pid = self._cluster.family, strike.look.leader_pids[strike.victim]
        workers = await asyncio.to_thread(family.workers_of, leader_pid)
        if not workers:
            raise ProcessLookupError(f"leader {leader_pid} has no workers")
        family.signal(workers[-1], signal.SIGKILL)

    async def _drain(self, strike: Strike) -> None:
        async with grpc.aio.insecure_channel(
            self._cluster.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
            request = DrainReplicaRequest(replica_id=strike.victim)
            await stub.DrainReplica(request, timeout=CALL_TIMEOUT_S)

    async def _kill_gateway(self, strike: Strike) -> None:
        self._cluster.family.signal(strike.look.gateway_pids[strike.victim], signal.SIGKILL)

    async def _stop_gateway(self, strike: Strike) -> None:
        pid = strike.look.gateway_pids[strike.victim]
        self._stop("gateway", pid, self._cluster.config.gateway.heartbeat_timeout_s)

    async def _end_gateway(self, strike: Strike) -> None:
        self._cluster.family.signal(strike.look.gateway_pids[strike.victim], signal.SIGTERM)

    async def _restart_redis(self, strike: Strike) -> None:
        await asyncio.to_thread(self._cluster.redis.kill)
        await asyncio.sleep(strike.kind.lasts_s)
        await asyncio.to_thread(self._cluster.redis.start)

    async def _stop_redis(self, strike: Strike) -> None:
        pid = self._cluster.redis.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(strike.kind.lasts_s)
        finally:
            os.kill(pid, signal.SIGCONT)

    async def _flush_redis(self, strike: Strike) -> None:
        await asyncio.to_thread(self._flush)

    def _flush(self) -> None:
        connection = Redis.from_url(self._cluster.redis.url, socket_timeout=CALL_TIMEOUT_S)
        try:
            connection.flushall()
        finally:
            connection.close()

    async def _kill_mover(self, strike: Strike) -> None:
        samples = await asyncio.to_thread(self._cluster.family.sample)
        movers = [sample.pid for sample in samples if sample.kind == "mover"]
        if not movers:
            raise ProcessLookupError("no mover runs: has the store been switched off?")
        self._cluster.family.signal(movers[0], signal.SIGKILL)

    async def _cut(self, strike: Strike) -> None:
        self._network.cut()

    async def _hole(self, strike: Strike) -> None:
        self._network.hold()
        try:
            await asyncio.sleep(strike.kind.lasts_s)
        finally:
            self._network.release()
