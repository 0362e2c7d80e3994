"""Brings the workers of a group and their leader together, wherever the workers were started.

worker ──"hello"──► plans      at once
worker ──"ready"──► plans      when it has loaded its shard and joined its peers
worker ──"hello"──► beats      then, from a thread of its own
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.config import ClusterConfig
from cluster.errors import UnavailableError
from cluster.replica.build import WorkerTier
from cluster.replica.channel import Channel, ChannelListener
from cluster.replica.group import GroupLifecycle
from cluster.replica.guardian_start import GuardianHandle
from cluster.replica.heartbeat import SEND_TIMEOUT_S
from cluster.replica.processes import ProcessId
from cluster.replica.worker import WorkerSpec

logger = logging.getLogger(__name__)

TICK_S = 0.1
BEATS_TIMEOUT_S = 10.0  # for workers that are ready to beat


@dataclass(frozen=True, slots=True)
class Connections:
    """What a leader has of its workers, by index."""

    plans: list[Channel]
    beats: list[Channel]


class Muster:
    """Waits for the workers of one group.

    Args:
        config: Of the cluster.
        host: Address of the leader that workers can reach.
        guardian: Of the leader's process: ends workers on its machine with it.
    """

    def __init__(
        self, config: ClusterConfig, host: str, guardian: GuardianHandle | None = None
    ) -> None:
        self._config = config
        self._guardian = guardian
        num_workers = config.parallel.world_size
        self._plans = ChannelListener(host, num_workers)
        self._beats = ChannelListener(host, num_workers)

    def spec(
        self,
        template: WorkerSpec,
        index: int,
        endpoints: Sequence[tuple[str, int]],
        tier: WorkerTier,
    ) -> WorkerSpec:
        """Return what a worker has to know.

        Args:
            template: What all have in common.
            index: Of the worker.
            endpoints: Address and a free port of every worker, by index.
            tier: Of this worker.
        """
        tp = self._config.parallel.tp
        return replace(
            template,
            index=index,
            leader_address=self._plans.address,
            auth_key=self._plans.auth_key,
            beat_address=self._beats.address,
            beat_key=self._beats.auth_key,
            stage_port=endpoints[index - index % tp][1],
            # Where a stage has several ranks, worker 0's port is its stage's; the next rank's is
            # free, and on the same node.
            pipeline_address=endpoints[0 if tp == 1 else 1],
            tier=tier,
        )

    async def gather(self, lifecycle: GroupLifecycle) -> Connections:
        """Return the connections of all workers, once all are ready.

        Raises:
            UnavailableError: One of them failed, ended or was late: `lifecycle` is over, or its
                time to start.
        """
        replica, engine = self._config.replica, self._config.engine
        main = asyncio.get_running_loop()

        def on_ready(index: int, facts: dict[str, Any]) -> None:
            logger.info("worker %d is ready: %s", index, facts)
            if self._guardian is not None:
                self._guardian.add_child(ProcessId(*facts["process"]))
            main.call_soon_threadsafe(lifecycle.worker_ready, index)

        try:
            plans = await _accept(
                self._plans,
                lifecycle,
                timeout_s=replica.start_timeout_s,
                send_timeout_s=engine.step_timeout_s,
                on_ready=on_ready,
            )
            beats = await _accept(
                self._beats,
                lifecycle,
                timeout_s=BEATS_TIMEOUT_S,
                send_timeout_s=SEND_TIMEOUT_S,
                on_ready=lambda *_: None,
            )
        finally:
            self._plans.close()
            self._beats.close()
        return Connections(plans, beats)


async def _accept(
    listener: ChannelListener, lifecycle: GroupLifecycle, *, timeout_s: float, **options: Any
) -> list[Channel]:
    """Return all channels of a listener, unless the group is over before."""
    deadline_s = time.monotonic() + timeout_s
    accepting = asyncio.create_task(
        asyncio.to_thread(listener.accept_all, timeout_s=timeout_s, **options)
    )
    while not accepting.done() and not lifecycle.is_over and time.monotonic() < deadline_s:
        await asyncio.wait([accepting], timeout=TICK_S)
        lifecycle.tick(0)
    if not accepting.done():
        listener.close()
        await asyncio.wait([accepting], timeout=2.0)  # it may know the reason better
    if accepting.done():
        return accepting.result()
    raise UnavailableError(f"the group did not start: {lifecycle.reason or 'it ended'}")
