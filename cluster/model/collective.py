"""What the tensor-parallel ranks of one stage do together.

DeepSpeed's operator for the CPU goes through shared memory; it reduces over the whole default
process group and ignores any other. So the ranks of one stage, and nobody else, are that group, and
every stage on a host has a port of its own: the shared memory is named after it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.errors import UnavailableError
from cluster.model.shm_operator import check_compiler, load_operator

BUFFER_BYTES = 8 + 2 * (2**20 + 2**25)
"""Of shared memory per rank: two states, and two buffers each for small and for large messages
(`allreduce_workspace` in DeepSpeed's csrc/cpu/comm/shm.cpp)."""

logger = logging.getLogger(__name__)


class Collective(Protocol):
    """The tensor-parallel ranks of one stage; every rank makes the same calls in the same order."""

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the ranks."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors joined along the last dim, in the order of the ranks."""
        ...


class NoCollective:
    """One rank: everything is here already."""

    def all_reduce_(self, tensor: Tensor) -> None:
        """Leave `tensor` as it is."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return `tensor`."""
        return tensor


class DeepSpeedCollective:
    """Collectives of `deepspeed.comm` through a CPU host's shared memory.

    A dead rank leaves the others waiting for ever: whoever started them has to end them.
    """

    def __init__(self, comm: Any, tp: int) -> None:
        self._comm = comm
        self._tp = tp

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the ranks; it must be contiguous."""
        assert tensor.is_contiguous(), tensor.stride()
        self._comm.inference_all_reduce(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors joined along the last dim."""
        parts = [torch.empty_like(tensor) for _ in range(self._tp)]
        self._comm.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=-1)


def init_tensor_parallel(
    tp_rank: int,
    tp: int,
    master_port: int,
    *,
    master_address: str = "127.0.0.1",
    timeout_s: float = 300.0,
) -> Collective:
    """Join the tensor-parallel ranks of one stage and return their collective.

    Once per process: it sets environment variables and torch's default process group. The first
    call on a machine compiles for about 20 s.

    Args:
        tp_rank: [0, tp).
        tp: Number of ranks; 1 needs no others and returns at once.
        master_port: Free port on rank 0's host, a different one for every stage on it.
        master_address: Of rank 0's host.
        timeout_s: For all ranks to arrive, seconds.

    Raises:
        ConfigError: There is no C++ compiler.
        UnavailableError: There is too little shared memory.
        TimeoutError: Another process took too long to compile DeepSpeed's operator.
    """
    if tp == 1:
        return NoCollective()
    check_compiler()
    comm = init_world(
        tp_rank, tp, local_rank=tp_rank, host=master_address, port=master_port, timeout_s=timeout_s
    )
    logger.info("tensor parallel: rank %d of %d through deepspeed.comm", tp_rank, tp)
    return DeepSpeedCollective(comm, tp)


def init_world(
    rank: int,
    size: int,
    *,
    local_rank: int,
    host: str,
    port: int,
    device: str = "cpu",
    timeout_s: float,
) -> Any:
    """Make all ranks torch's default process group and return `deepspeed.comm`.

    Args:
        rank: [0, size).
        size: Number of ranks, all of which call this.
        local_rank: Of the device that the rank computes on.
        host: Where rank 0 runs.
        port: A free port there.
        device: "cpu" (gloo and shared memory) or "cuda" (NCCL).
        timeout_s: For all ranks to arrive, seconds.

    Raises:
        UnavailableError: There is too little shared memory.
        TimeoutError: Another process took too long to compile DeepSpeed's operator.
    """
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(size),
        LOCAL_SIZE=str(size),  # without it DeepSpeed ends in a segmentation fault
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        DS_ACCELERATOR=device,
    )
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs, ours is the standard output
        import deepspeed.comm as comm

        buffer = Path("/dev/shm") / buffer_name(rank, port, host=host)
        if device == "cpu":
            load_operator(timeout_s=timeout_s)
            reserve_buffer(buffer)
        comm.init_distributed(
            dist_backend="nccl" if device == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
            rank=rank,
            world_size=size,
        )
    if device == "cpu":
        comm.barrier()  # every rank has mapped every buffer: their names are needed no more
        buffer.unlink(missing_ok=True)  # so that no way to end leaves it behind
    return comm


def buffer_name(rank: int, port: int, *, host: str = "127.0.0.1") -> str:
    """Return what DeepSpeed calls a rank's shared memory until all ranks have mapped it."""
    return f"deepspeed_allreduce_buffer_{os.getuid()}_{host}_{port}_{rank}"


def reserve_buffer(path: Path, num_bytes: int = BUFFER_BYTES) -> None:
    """Have the memory there that DeepSpeed will write a rank's buffer to.

    DeepSpeed goes on with as much as it gets, and dies of that later, by a signal.

    Raises:
        UnavailableError: There is too little shared memory.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UnavailableError(
            f"{path.parent} has no room for {num_bytes} bytes, which tensor parallelism on CPUs "
            f"wants for each rank ({error.strerror}): enlarge it (docker run --shm-size; on "
            "Kubernetes an emptyDir with medium: Memory), or use parallel.tp=1"
        ) from error
    finally:
        os.close(descriptor)
