"""The tiers below the KV cache of a group of workers: each has a host tier, and a mover beside it.

    worker ──starts──► mover ──calls──► leader       one connection per mover, as per worker

A group whose movers do not come computes without a store.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from cluster.clock import WallClock
from cluster.config import ClusterConfig
from cluster.errors import UnavailableError
from cluster.model.model_info import ModelInfo
from cluster.replica.build import (
    Tiers,
    WorkerTier,
    fingerprint_of,
    mover_spec,
    num_slots_of,
    part_nbytes,
)
from cluster.replica.channel import ChannelListener
from cluster.replica.mover_link import MoverLink
from cluster.replica.mover_start import SEND_TIMEOUT_S

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0  # for movers that were started when their workers became ready


class GroupTiers:
    """The leader's part; `tiers` is for the engine.

    Args:
        config: Of the cluster.
        model: What the checkpoint says.
        host: Address of the leader that movers can reach.
    """

    def __init__(self, config: ClusterConfig, model: ModelInfo, host: str) -> None:
        self._config, self._model = config, model
        self._fingerprint = fingerprint_of(config)
        self._num_slots = num_slots_of(config, model)
        self._listener: ChannelListener | None = None
        if self._num_slots and config.store.resolved_kv_url != "off":
            self._listener = ChannelListener(host, config.parallel.world_size)
        self._link: MoverLink | None = None

    @property
    def tiers(self) -> Tiers:
        """What the engine decides about."""
        largest = max(
            part_nbytes(self._config, self._model, stage)
            for stage in range(self._config.parallel.pp)
        )
        return Tiers(self._num_slots, largest, self._link)

    def of_worker(self, index: int) -> WorkerTier:
        """Return what a worker has to know."""
        spec = mover_spec(self._config, self._model, index, self._fingerprint)
        if self._listener is None:
            return WorkerTier(self._num_slots, spec.block_nbytes)
        spec = replace(
            spec, leader_address=self._listener.address, auth_key=self._listener.auth_key
        )
        return WorkerTier(self._num_slots, spec.block_nbytes, spec)

    def connect(self, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Wait for the movers, once all workers are ready; without them there is no store."""
        if self._listener is None:
            return
        too_late = threading.Timer(timeout_s, self._listener.close)
        too_late.daemon = True
        too_late.start()
        try:
            channels = self._listener.accept_all(
                timeout_s=timeout_s, send_timeout_s=SEND_TIMEOUT_S, on_ready=lambda *_: None
            )
        except UnavailableError:
            logger.warning("no blocks are stored or fetched: a mover did not start")
        else:
            self._link = MoverLink(
                channels, timeout_s=self._config.store.timeout_s, clock=WallClock()
            )
        finally:
            too_late.cancel()
            self._listener.close()

    def close(self) -> None:
        """End the movers: their leader is gone."""
        if self._listener is not None:
            self._listener.close()
        if self._link is not None:
            self._link.shutdown()
