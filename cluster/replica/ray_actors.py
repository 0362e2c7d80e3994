"""All calls to Ray that make and end a replica group.

One Serve replica is one group: Serve reserves the placement group, runs the leader in its first
bundle and builds the whole anew when the leader ends. Workers are children of the leader without
restarts: they die with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Any

import ray
from ray import serve
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.clock import WallClock
from cluster.config import ClusterConfig, parse_config
from cluster.engine.executor import Executor
from cluster.errors import UnavailableError
from cluster.kvstore.block_store import BlockStore
from cluster.kvstore.open import open_block_store, open_store
from cluster.model.checkpoint import ModelInfo, inspect_checkpoint
from cluster.model.runner import num_blocks_for
from cluster.replica.build import load_whole, max_model_len_of
from cluster.replica.channel import Channel
from cluster.replica.executor import GroupExecutor, InProcessExecutor
from cluster.replica.group import GroupLifecycle, GroupState
from cluster.replica.group_tiers import GroupTiers
from cluster.replica.guardian_start import GuardianHandle
from cluster.replica.leader import Leader
from cluster.replica.local_tiers import LocalTiers
from cluster.replica.muster import Muster
from cluster.replica.placement import bundles, leader_num_cpus, threads_per_worker
from cluster.replica.processes import ProcessId
from cluster.replica.worker import WorkerSpec, run_worker

logger = logging.getLogger(__name__)

WILDCARD_HOSTS = ("0.0.0.0", "::", "[::]")  # to listen on; others call the node's address
STOP_MARGIN_S = 10.0  # beyond the drain's time, to end the processes


class WorkerActor:
    """The process of one rank."""

    def endpoint(self) -> tuple[str, int]:
        """Return this node's address and a free port on it."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, int(probe.getsockname()[1])

    def run(self, spec: WorkerSpec) -> None:
        """Work until the leader ends it."""
        logging.basicConfig(level=logging.INFO)
        run_worker(spec)


class ReplicaGroup:
    """The Serve deployment: one replica of it is one group."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        self._config = parse_config(config)
        self._workers: list[Any] = []
        self._beats: list[Channel] = []
        self._guardian = GuardianHandle()
        self._watchers: list[asyncio.Task[None]] = []
        self._lifecycle = GroupLifecycle(
            self._config.parallel.world_size,
            start_timeout_s=self._config.replica.start_timeout_s,
            drain_timeout_s=self._config.replica.drain_timeout_s,
            clock=WallClock(),
        )
        self._leader: Leader | None = None
        context = serve.get_replica_context()
        model = inspect_checkpoint(self._config.model.folder)
        self._tiers: LocalTiers | GroupTiers | None = None
        self._blocks: BlockStore | None = None
        executor = await self._make_executor(model)
        host = self._config.replica.host
        self._store = open_store(self._config.store)
        tiers = self._tiers.tiers if self._tiers is not None else None
        if tiers is not None and tiers.mover is not None:
            self._blocks = open_block_store(self._config.store)
        leader = Leader(
            self._config,
            model=model,
            executor=executor,
            lifecycle=self._lifecycle,
            store=self._store,
            replica_id=context.replica_id.unique_id,
            node_id=ray.get_runtime_context().get_node_id(),
            public_host=ray.util.get_node_ip_address() if host in WILDCARD_HOSTS else host,
            on_end=self._end,
            tiers=tiers,
            blocks=self._blocks,
            beats=self._beats,
        )
        self.info = await leader.start()
        self._leader = leader  # from here on there is something to drain
        self._guardian.arm(self._config.replica.heartbeat_timeout_s)
        self._check_alive()

    async def _make_executor(self, model: ModelInfo) -> Executor:
        config = self._config
        scaling = config.replica.autoscaling
        num_groups = scaling.max_replicas if scaling else config.replica.num_replicas
        num_threads = threads_per_worker(config.parallel, os.cpu_count() or 1, num_groups)
        parallel = config.parallel
        num_blocks = num_blocks_for(
            model,
            config.cache,
            config.model.dtype,
            parallel.tp,
            parallel.pp,
            device=config.model.device,
        )
        max_model_len = max_model_len_of(config, model)
        if parallel.world_size == 1:
            self._tiers = local = LocalTiers(
                config, model, on_mover=lambda pid: self._guardian.add_child(ProcessId.of(pid))
            )
            runner = await asyncio.to_thread(
                load_whole,
                config,
                num_blocks=num_blocks,
                max_model_len=max_model_len,
                num_threads=num_threads,
                slots=local.slots,
            )
            self._lifecycle.worker_ready(0)
            return InProcessExecutor(runner)
        spec = WorkerSpec(
            index=0,
            config=config.model_dump(),
            leader_address=("", 0),
            auth_key=b"",
            stage_port=0,
            pipeline_address=("", 0),
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            num_threads=num_threads,
        )
        self._tiers = tiers = GroupTiers(config, model, ray.util.get_node_ip_address())
        executor = await self._start_workers(spec, tiers)
        await asyncio.to_thread(tiers.connect)
        return executor

    async def _start_workers(self, template: WorkerSpec, tiers: GroupTiers) -> GroupExecutor:
        parallel = self._config.parallel
        group = get_current_placement_group()
        if group is None:
            raise UnavailableError("no placement group: deploy through cluster.gateway.app:build")
        actor = ray.remote(max_restarts=0, max_task_retries=0)(WorkerActor)
        for index in range(parallel.world_size):
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index + 1
            )
            resources = (bundles(parallel) or [])[index + 1]
            self._workers.append(
                actor.options(
                    num_cpus=resources["CPU"],
                    num_gpus=resources.get("GPU", 0),
                    scheduling_strategy=strategy,
                ).remote()
            )
        endpoints = await asyncio.wait_for(
            asyncio.gather(*(worker.endpoint.remote() for worker in self._workers)),
            self._config.replica.start_timeout_s,
        )
        muster = Muster(self._config, ray.util.get_node_ip_address(), self._guardian)
        refs = [
            worker.run.remote(muster.spec(template, index, endpoints, tiers.of_worker(index)))
            for index, worker in enumerate(self._workers)
        ]
        self._watchers = [
            asyncio.create_task(self._watch(index, ref)) for index, ref in enumerate(refs)
        ]
        connections = await muster.gather(self._lifecycle)
        self._beats = connections.beats
        return GroupExecutor(
            connections.plans, num_blocks=template.num_blocks, num_stages=parallel.pp
        )

    def _check_alive(self) -> None:
        if self._lifecycle.is_over:
            raise UnavailableError(f"the group did not start: {self._lifecycle.reason}")

    async def _watch(self, index: int, ref: Any) -> None:
        """Wait for a worker to end: while the group lives that is its death."""
        reason = "ended"
        try:
            await ref
        except Exception as error:
            reason = str(error).strip().splitlines()[-1] if str(error) else repr(error)
            logger.error("worker %d: %s", index, error)
        self._lifecycle.worker_lost(index, reason)
        if self._leader is not None:
            self._leader.fail(reason)

    def _end(self, reason: str) -> None:
        # Serve rebuilds the group when this process is gone. Ray ends the workers with their owner;
        # those that do not go, and movers, are ended by the guardian.
        if self._lifecycle.state is GroupState.STOPPED:
            logger.info("the group ends: %s", reason)
            os._exit(0)
        logger.error("the group failed: %s", reason)
        os._exit(1)

    def check_health(self) -> None:
        """Tell Serve whether the group lives."""
        if self._leader is not None:
            self._leader.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve the load, for the autoscaling policy."""
        load = self._leader.load if self._leader is not None else None
        return {"load": float(load.num_running + load.num_waiting) if load else 0.0}

    async def __del__(self) -> None:
        """Drain, then end: Serve calls this on scale-down, upgrade and shutdown."""
        if self._leader is not None:
            self._leader.drain()
            await self._leader.wait_drained()
        for watcher in self._watchers:
            watcher.cancel()
        if self._leader is not None:
            await self._leader.stop()
            await self._store.close()
        if self._blocks is not None:
            await self._blocks.close()
        if self._tiers is not None:
            await asyncio.to_thread(self._tiers.close)
        for worker in self._workers:
            ray.kill(worker)
        await asyncio.to_thread(self._guardian.close)


def group_deployment(
    config: ClusterConfig, scaling: dict[str, Any], environment: dict[str, str]
) -> serve.Application:
    """Return the bound deployment of all replica groups.

    Args:
        config: Of the cluster.
        scaling: Serve's options that say how many groups there are.
        environment: Variables of the leaders' processes.
    """
    options: dict[str, Any] = {
        "name": "replica-group",
        "ray_actor_options": {
            "num_cpus": leader_num_cpus(config.parallel),
            "runtime_env": {"env_vars": environment},
        },
        "graceful_shutdown_timeout_s": config.replica.drain_timeout_s + STOP_MARGIN_S,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 1.0,
        "health_check_timeout_s": 30.0,
        "max_ongoing_requests": 1000,
        **scaling,
    }
    if config.parallel.world_size == 1 and config.parallel.num_gpus_per_worker:
        options["ray_actor_options"]["num_gpus"] = config.parallel.num_gpus_per_worker
    reserved = bundles(config.parallel)
    if reserved is not None:
        options["placement_group_bundles"] = reserved
        # ranks of a stage share memory, so they have to share a node
        options["placement_group_strategy"] = "STRICT_PACK" if config.parallel.tp > 1 else "PACK"
    return serve.deployment(ReplicaGroup).options(**options).bind(config.model_dump())
