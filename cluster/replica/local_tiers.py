"""The tiers below the KV cache of a group of one, whose engine computes in its own process."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cluster.clock import WallClock
from cluster.config import ClusterConfig
from cluster.model.model_info import ModelInfo
from cluster.replica.build import Tiers, fingerprint_of, mover_spec, num_slots_of
from cluster.replica.channel import Channel
from cluster.replica.host_memory import HostMemory
from cluster.replica.mover_link import MoverLink
from cluster.replica.mover_start import MoverHandle, OpenStore, start_mover


class LocalTiers:
    """Host tier and mover; `tiers` is for the engine, `slots` for the model runner.

    Args:
        config: Of the cluster, tp = pp = 1.
        model: What the checkpoint says.
        open_store: Makes the store of blocks, used in a thread of this process alone; None goes by
            `config.store`, where the embedded one needs a Ray that is initialised.
        on_mover: Called with the number of every process that is started for a mover.

    Raises:
        ConfigError: The memory is not there, or the store's URL cannot be read.
    """

    def __init__(
        self,
        config: ClusterConfig,
        model: ModelInfo,
        open_store: OpenStore | None = None,
        *,
        on_mover: Callable[[int], None] = lambda _: None,
    ) -> None:
        spec = mover_spec(config, model, 0, fingerprint_of(config))
        num_slots = num_slots_of(config, model)
        self._on_mover = on_mover
        self._memory: HostMemory | None = None
        self._mover: MoverHandle | None = None
        self._link: MoverLink | None = None
        if num_slots:
            self._memory = HostMemory(
                num_slots, spec.block_nbytes, page_locked=config.model.device == "cuda"
            )
            self._mover = start_mover(spec, self._memory, open_store)
            self._tell(self._mover)
        self._spec, self._open_store = spec, open_store
        if self._mover is not None:
            self._link = MoverLink(
                [self._mover.channel],
                timeout_s=config.store.timeout_s,
                clock=WallClock(),
                restart=self._restart,
            )
        self.tiers = Tiers(num_slots, spec.block_nbytes, self._link)

    @property
    def slots(self) -> Tensor | None:
        """uint8 [slots, block_nbytes]; None where there is no host tier."""
        return self._memory.slots if self._memory else None

    @property
    def mover_pid(self) -> int | None:
        """Of the mover's process; None where it is a thread, or there is none."""
        return self._mover.pid if self._mover else None

    def _restart(self) -> Channel | None:
        if self._mover is None or self._memory is None:
            return None
        self._mover.close()  # one that is stopped might wake up and write to slots of others
        mover = start_mover(self._spec, self._memory, self._open_store)
        self._tell(mover)
        self._mover = mover or self._mover
        return mover.channel if mover is not None else None

    def _tell(self, mover: MoverHandle | None) -> None:
        if mover is not None and mover.pid is not None:
            self._on_mover(mover.pid)

    def close(self) -> None:
        """End the mover and let go of the memory; neither engine nor runner may be used again."""
        if self._link is not None:
            self._link.shutdown()
        if self._mover is not None:
            self._mover.close()
        if self._memory is not None:
            self._memory.close()
