"""The workers of a group on GPUs: one NCCL world, a sub-group per stage, a link per neighbour.

    tp=2, pp=2      stage 0: {0, 1}     stage 1: {2, 3}     links: {0, 2}, {1, 3}

One process per GPU. Everything goes through `deepspeed.comm`. A dead rank leaves the others waiting
until the timeout: whoever started them has to end them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from cluster.model.collective import Collective, NoCollective, init_world

logger = logging.getLogger(__name__)


class GroupCollective:
    """Collectives of the ranks of one stage.

    Args:
        comm: `deepspeed.comm`, initialised.
        group: Of the stage's ranks.
        tp: How many they are.
    """

    def __init__(self, comm: Any, group: Any, tp: int) -> None:
        self._comm, self._group, self._tp = comm, group, tp

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the ranks; it must be contiguous."""
        assert tensor.is_contiguous(), tensor.stride()
        self._comm.all_reduce(tensor, group=self._group)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors joined along the last dim."""
        flat = tensor.reshape(-1, tensor.shape[-1]).contiguous()
        parts = flat.new_empty(self._tp * flat.shape[0], flat.shape[1])
        self._comm.all_gather_into_tensor(parts, flat, group=self._group)
        joined = torch.cat(parts.chunk(self._tp), dim=-1)
        return joined.view(*tensor.shape[:-1], joined.shape[-1])


class Link:
    """One direction between a rank and the same tp_rank of a neighbouring stage."""

    def __init__(self, comm: Any, group: Any, peer: int) -> None:
        self._comm, self._group, self._peer = comm, group, peer

    def send(self, tensor: Tensor) -> Any:
        """Begin to send; `wait` of what is returned lets the current stream wait, not the host."""
        return self._comm.isend(tensor, self._peer, group=self._group)

    def receive(self, tensor: Tensor) -> Any:
        """Begin to fill `tensor`; likewise."""
        return self._comm.irecv(tensor, self._peer, group=self._group)


class DeviceWorld:
    """A worker's place among all workers of its group.

    Once per process: it sets environment variables and torch's default process group. All workers
    call it together.

    Args:
        index: Of this worker, [0, tp * pp).
        tp: Ranks per stage.
        pp: Stages.
        host: Where worker 0 runs.
        port: A free port there.
        device: "cuda"; "cpu" runs the same on gloo.
        timeout_s: For all to arrive, and of one transfer, seconds.
    """

    def __init__(
        self,
        index: int,
        tp: int,
        pp: int,
        *,
        host: str,
        port: int,
        device: str = "cuda",
        timeout_s: float = 300.0,
    ) -> None:
        comm = init_world(
            index,
            tp * pp,
            local_rank=0,  # Ray shows each worker the one GPU that is its own
            host=host,
            port=port,
            device=device,
            timeout_s=timeout_s,
        )
        # Every worker makes every sub-group, in the same order, as torch demands.
        stages = [comm.new_group(list(range(s * tp, (s + 1) * tp))) for s in range(pp)]
        links = [comm.new_group([low, low + tp]) for low in range((pp - 1) * tp)]
        self.collective: Collective = NoCollective()
        if tp > 1:
            self.collective = GroupCollective(comm, stages[index // tp], tp)
        self.previous = Link(comm, links[index - tp], index - tp) if index >= tp else None
        self.next = Link(comm, links[index], index + tp) if index < len(links) else None
        logger.info("worker %d of %d joined through deepspeed.comm on %s", index, tp * pp, device)
