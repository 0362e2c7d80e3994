"""Activations between the stages of a pipeline.

One gloo group over all workers, made directly on a store: the default process group of a worker is
its stage's, because DeepSpeed's shared-memory collectives always reduce over the default one.
A stage sends to the same tp_rank of the next stage, and begins the next step while that is on its
way.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from cluster.model.device_world import DeviceWorld


class Neighbours(Protocol):
    """The stages before and after a worker's own."""

    def send(self, hidden_TD: Tensor) -> None:
        """Send to the next stage; waits only for the transfer before this one."""
        ...

    def receive(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """Return what the previous stage sent, [num_tokens, hidden_size]."""
        ...


class Pipeline:
    """A worker's place between the stage before and the stage after.

    Args:
        host: Where worker 0 runs.
        port: A free port there.
        index: Of this worker.
        tp: Workers per stage.
        pp: Stages.
        timeout_s: Of one transfer, and of joining.
    """

    def __init__(
        self, *, host: str, port: int, index: int, tp: int, pp: int, timeout_s: float
    ) -> None:
        timeout = timedelta(seconds=timeout_s)
        gloo: Any = distributed  # torch's stubs lack these classes and their methods
        store = gloo.TCPStore(host, port, tp * pp, is_master=index == 0, timeout=timeout)
        self._group = gloo.ProcessGroupGloo(
            gloo.PrefixStore("pipeline", store), index, tp * pp, timeout
        )
        self._previous = index - tp
        self._next = index + tp
        self._sending: tuple[Any, Tensor] | None = None  # gloo reads the tensor until it is done

    def send(self, hidden_TD: Tensor) -> None:
        """Send to the next stage; waits only for the transfer before this one."""
        if self._sending is not None:
            self._sending[0].wait()
        tensor = hidden_TD.contiguous()
        self._sending = (self._group.send([tensor], self._next, 0), tensor)

    def receive(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """Return what the previous stage sent, [num_tokens, hidden_size]."""
        hidden_TD = torch.empty(num_tokens, hidden_size, dtype=dtype)
        self._group.recv([hidden_TD], self._previous, 0).wait()
        return hidden_TD


class DevicePipeline:
    """The same between GPUs: activations never touch the host, and the host never waits for them.

    Args:
        world: Of the group's workers.
        device: Where activations are wanted.
    """

    def __init__(self, world: DeviceWorld, device: torch.device) -> None:
        self._world = world
        self._device = device
        self._sending: tuple[Any, Tensor] | None = None  # the link reads the tensor until then

    def send(self, hidden_TD: Tensor) -> None:
        """Send to the next stage; the stream waits for the transfer before this one."""
        if self._sending is not None:
            self._sending[0].wait()
            self._sending = None
        if hidden_TD.numel():  # a step without sequences has nothing to pass on
            assert self._world.next is not None, "the last stage sends nothing"
            tensor = hidden_TD.contiguous()
            self._sending = (self._world.next.send(tensor), tensor)

    def receive(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """Return what the previous stage sent, [num_tokens, hidden_size]."""
        hidden_TD = torch.empty(num_tokens, hidden_size, dtype=dtype, device=self._device)
        if num_tokens:
            assert self._world.previous is not None, "the first stage receives nothing"
            self._world.previous.receive(hidden_TD).wait()
        return hidden_TD
