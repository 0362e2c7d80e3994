"""The memory of a worker's host tier: numbered slots that a mover's process maps as well.

    file without a name  |  slot 0  |  slot 1  |  ...  |      `block_nbytes` each

The file is anonymous: nothing is left of it when the last process that maps it has ended, however
it ended, and a container's small /dev/shm does not bound it. A page takes memory from its first
use on; on a GPU machine all of them from the start, because page-locked memory is never moved.
"""

from __future__ import annotations

import mmap
import os
import tempfile

import torch

from cluster.errors import ConfigError


class HostMemory:
    """Slots for blocks, shared by file descriptor.

    Args:
        num_slots: >= 1.
        block_nbytes: Of this worker's part of a block.
        page_locked: For copies from and to a GPU, which is initialised.

    Raises:
        ConfigError: The memory is not there.
    """

    def __init__(self, num_slots: int, block_nbytes: int, *, page_locked: bool = False) -> None:
        assert num_slots > 0 and block_nbytes > 0, (num_slots, block_nbytes)
        self.num_slots, self.block_nbytes = num_slots, block_nbytes
        num_bytes = num_slots * block_nbytes
        self.fd = _open_unnamed()
        try:
            os.ftruncate(self.fd, num_bytes)
            self._memory = mmap.mmap(self.fd, num_bytes)
        except OSError as error:
            os.close(self.fd)
            raise ConfigError(
                f"a host tier of {num_bytes} bytes is not to be had: {error}; lower "
                "cache.host_memory_bytes",
                field="cache.host_memory_bytes",
            ) from error
        self.slots = torch.frombuffer(self._memory, dtype=torch.uint8).view(num_slots, block_nbytes)
        """uint8 [num_slots, block_nbytes]."""
        self._is_locked = page_locked
        if page_locked:
            self._lock_pages(num_bytes)

    def view(self) -> memoryview:
        """Return all slots' bytes, one after the other."""
        return memoryview(self._memory)

    def close(self) -> None:
        """Let go of it; the pages are free when nobody else maps them or holds `slots`."""
        if self._is_locked:
            torch.cuda.cudart().cudaHostUnregister(self.slots.data_ptr())  # type: ignore[no-untyped-call]
            self._is_locked = False
        self.slots = torch.empty(0, self.block_nbytes, dtype=torch.uint8)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _lock_pages(self, num_bytes: int) -> None:
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = cudart.cudaHostRegister(self.slots.data_ptr(), num_bytes, 0)
        if int(status):
            self._is_locked = False
            self.close()
            raise ConfigError(
                f"a host tier of {num_bytes} bytes cannot be page-locked (CUDA error "
                f"{int(status)}): lower cache.host_memory_bytes, or raise the limit of locked "
                "memory (ulimit -l)",
                field="cache.host_memory_bytes",
            )


def _open_unnamed() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("sluice-host-tier")
    with tempfile.TemporaryFile() as file:  # unlinked already
        return os.dup(file.fileno())
