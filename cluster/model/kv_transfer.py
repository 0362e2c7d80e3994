"""KV blocks between a worker's cache and the host, beside the computation.

    read    compute stream --event--> side stream: gather, copy to a pinned buffer --event--> host
    write   host: fill a pinned buffer --> side stream: copy, scatter --event--> compute stream

The compute stream never waits for the host, and for a write only as long as the copy of one block
takes. Pageable memory would be copied twice, with the whole device waiting. Buffers are few and
fixed: a caller that is faster than the bus waits for the oldest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cluster.errors import InvalidArgumentError
from cluster.kernels.kv_cache import KVCache

NUM_BUFFERS = 4
"""Blocks on their way at once."""


class BlockTransfer(Protocol):
    """Blocks of a KV cache as bytes."""

    def read_block(self, block_id: int) -> bytes:
        """Return a block, all its layers, bit-exact."""
        ...

    def write_block(self, block_id: int, data: bytes) -> None:
        """Replace a block by what `read_block` returned; later steps see it."""
        ...


def open_transfer(cache: KVCache) -> BlockTransfer:
    """Return how blocks of `cache` are read and written: the cache itself on a CPU."""
    return PinnedTransfer(cache) if cache.numbers_L2BSKH.is_cuda else cache


class PinnedTransfer:
    """Blocks of a cache on a GPU; one caller at a time, on the thread that computes.

    Args:
        cache: Whose blocks they are; the bytes are those of its own `read_block`.
        num_buffers: Pinned, of one block each.
    """

    def __init__(self, cache: KVCache, num_buffers: int = NUM_BUFFERS) -> None:
        self._cache = cache
        self._device = cache.numbers_L2BSKH.device
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._buffers = torch.empty(
            (num_buffers, cache.block_nbytes), dtype=torch.uint8, pin_memory=True
        )
        self._is_free = [
            torch.cuda.Event()  # type: ignore[no-untyped-call]
            for _ in range(num_buffers)
        ]
        self._next = 0

    def read_block(self, block_id: int) -> bytes:
        """Return a block as steps issued so far leave it; waits for these and for its copy."""
        index = self._take_buffer()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            packed = pack(block_parts(self._cache, block_id))
            self._buffers[index].copy_(packed, non_blocking=True)
            self._is_free[index].record()
        self._is_free[index].synchronize()
        return self._buffers[index].numpy().tobytes()

    def write_block(self, block_id: int, data: bytes) -> None:
        """Replace a block before any step that is issued later; does not wait for the copy.

        Raises:
            InvalidArgumentError: `data` is not `block_nbytes` long.
        """
        if len(data) != self._cache.block_nbytes:
            raise InvalidArgumentError(
                f"block of {len(data)} bytes, expected {self._cache.block_nbytes}: it belongs to "
                "another model, dtype or layout; drop it",
                field="data",
            )
        index = self._take_buffer()
        self._buffers[index].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        compute = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(compute)  # steps on their way may still read the block
        with torch.cuda.stream(self._stream):
            packed = self._buffers[index].to(self._device, non_blocking=True)
            unpack(packed, block_parts(self._cache, block_id))
            self._is_free[index].record()
        compute.wait_event(self._is_free[index])

    def _take_buffer(self) -> int:
        index, self._next = self._next, (self._next + 1) % len(self._is_free)
        self._is_free[index].synchronize()  # at once, where it was never used
        return index


def block_parts(cache: KVCache, block_id: int) -> list[Tensor]:
    """Return views of a block's numbers and scales, in the order of its bytes."""
    parts = [cache.numbers_L2BSKH, cache.scales_L2BSK]
    return [part[:, :, block_id] for part in parts if part is not None]


def pack(parts: Sequence[Tensor]) -> Tensor:
    """Return the bytes of `parts`, one after the other, uint8 on their device."""
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def unpack(packed: Tensor, parts: Sequence[Tensor]) -> None:
    """Fill `parts` with what `pack` returned."""
    sizes = [part.numel() * part.element_size() for part in parts]
    for part, fresh in zip(parts, torch.split(packed, sizes), strict=True):
        part.copy_(fresh.view(part.dtype).view(part.shape))
