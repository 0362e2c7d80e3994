"""KV blocks between a worker's cache and its host tier, around the computation of a step.

On a CPU both are memory, and blocks are copied before the step. On a GPU another stream copies:

    compute stream ──► gather offloads ──event──► compute stream goes on
                           └──► copy to slots ──► copy from slots, scatter restores ──event──►

Without restores the step computes while its offloads are still on their way to the host. The slots
are page-locked: pageable memory would be copied twice, with the whole device waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.kernels.kv_cache import KVCache
from cluster.step import BlockMoves


class BlockTransfer(Protocol):
    """Carries out the moves of a step."""

    def begin(self, moves: BlockMoves) -> None:
        """Move blocks: a step that is issued after this call finds them where they belong."""
        ...

    def finish(self) -> None:
        """Return when every move that was begun is complete, the slots' bytes included."""
        ...


def open_transfer(cache: KVCache, slots: Tensor) -> BlockTransfer:
    """Return how blocks travel between `cache` and `slots`.

    Args:
        cache: Of a worker.
        slots: uint8 [slots, block_nbytes] on the host; the caller frees it after the last move.

    Raises:
        ConfigError: The slots are of another size: they belong to another model or layout.
    """
    if slots.ndim != 2 or slots.shape[1] != cache.block_nbytes:
        raise ConfigError(
            f"slots of shape {list(slots.shape)}, a block of this worker has {cache.block_nbytes} "
            "bytes: they were made for another model, dtype or layout",
            field="cache.host_memory_bytes",
        )
    if cache.numbers_L2BSKH.is_cuda:
        return PinnedTransfer(cache, slots)
    return HostTransfer(cache, slots)


class HostTransfer:
    """Blocks of a cache in host memory: copied at once."""

    def __init__(self, cache: KVCache, slots: Tensor) -> None:
        self._cache, self._slots = cache, slots

    def begin(self, moves: BlockMoves) -> None:
        """Copy every block."""
        for block, slot in moves.offloads:
            self._cache.offload(block, self._slots[slot])
        for slot, block in moves.restores:
            self._cache.restore(self._slots[slot], block)

    def finish(self) -> None:
        """Return: `begin` has done it all."""


class PinnedTransfer:
    """Blocks of a cache on a GPU; one caller at a time, on the thread that computes.

    Args:
        cache: Whose blocks they are.
        slots: Page-locked, or copies hold up the device.
    """

    def __init__(self, cache: KVCache, slots: Tensor) -> None:
        self._cache, self._slots = cache, slots
        self._device = cache.numbers_L2BSKH.device
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._gathered = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def begin(self, moves: BlockMoves) -> None:
        """Issue every copy behind the steps that were issued so far; waits for none."""
        compute = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            packed = [pack(self._cache.chunks(block)) for block, _ in moves.offloads]
            self._gathered.record()
            for block_bytes, (_, slot) in zip(packed, moves.offloads, strict=True):
                self._slots[slot].copy_(block_bytes, non_blocking=True)
            for slot, block in moves.restores:
                fresh = self._slots[slot].to(self._device, non_blocking=True)
                unpack(fresh, self._cache.chunks(block))
            self._done.record()
        compute.wait_event(self._done if moves.restores else self._gathered)

    def finish(self) -> None:
        """Wait for the copies that `begin` issued."""
        self._done.synchronize()  # returns at once where nothing was ever issued


def pack(parts: Sequence[Tensor]) -> Tensor:
    """Return the bytes of `parts`, one after the other, uint8 on their device."""
    return torch.cat([part.reshape(-1) for part in parts])


def unpack(packed: Tensor, parts: Sequence[Tensor]) -> None:
    """Fill `parts` with what `pack` returned."""
    fresh = torch.split(packed, [part.numel() for part in parts])
    for part, fresh_part in zip(parts, fresh, strict=True):
        part.copy_(fresh_part.view(part.shape))
