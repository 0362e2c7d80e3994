"""The paged KV cache of one worker: its memory, and its blocks as bytes.

    numbers  [layers, 2 (keys, values), blocks, slots, KV heads, head dim]   model's dtype, or int8
    scales   [layers, 2, blocks, slots, KV heads]                            float32, only with int8

int8 is symmetric: number = code * scale, one scale per token and head. As bytes, a block is its
numbers, then its scales, layer by layer. Shape suffixes: reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import ConfigError

SCALE_BYTES = 4
"""Of a scale."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, views into the `KVCache`."""

    keys_BSKH: Tensor  # contiguous
    values_BSKH: Tensor  # contiguous
    key_scales_BSK: Tensor | None = None  # float32, contiguous; None where the cache is not int8
    value_scales_BSK: Tensor | None = None  # likewise


class KVCache:
    """Keys and values of a worker's layers.

    Args:
        numbers_L2BSKH: Owned by the cache from now on.
        scales_L2BSK: Of an int8 cache.
    """

    def __init__(self, numbers_L2BSKH: Tensor, scales_L2BSK: Tensor | None) -> None:
        self.numbers_L2BSKH, self.scales_L2BSK = numbers_L2BSKH, scales_L2BSK
        parts = [numbers_L2BSKH] if scales_L2BSK is None else [numbers_L2BSKH, scales_L2BSK]
        self._layers = [self._view(index) for index in range(numbers_L2BSKH.shape[0])]
        # [layers x 2, blocks, bytes of one block's keys or values in one layer]
        self._bytes = [
            part.view(torch.uint8).view(-1, part.shape[2], part[0, 0, 0].nbytes) for part in parts
        ]
        self.block_nbytes = sum(part[:, 0].numel() for part in self._bytes)

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        int8: bool,
    ) -> KVCache:
        """Return an empty cache.

        Args:
            num_layers: Of this worker.
            num_blocks: >= 1.
            block_size: Slots per block.
            num_kv_heads: Of this worker.
            head_dim: Of a key.
            dtype: Of keys and values, unless `int8`.
            device: Where it lies.
            int8: Keep codes and scales instead.

        Raises:
            ConfigError: The memory is not there.
        """
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        kind = torch.int8 if int8 else dtype
        try:
            numbers = torch.zeros(shape, dtype=kind, device=device)
            scales = torch.zeros(shape[:-1], device=device) if int8 else None
        except (torch.OutOfMemoryError, RuntimeError) as error:
            num_bytes = torch.Size(shape).numel() * kind.itemsize
            raise ConfigError(
                f"the KV cache of {num_blocks} blocks, {num_bytes} bytes, does not fit on "
                f"{device}: lower cache.num_blocks or cache.memory_bytes",
                field="cache.num_blocks",
            ) from error
        return cls(numbers, scales)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.block_nbytes * self.numbers_L2BSKH.shape[2]

    def layer(self, index: int) -> LayerCache:
        """Return a layer's part; `index` counts this worker's layers."""
        return self._layers[index]

    def _view(self, index: int) -> LayerCache:
        keys, values = self.numbers_L2BSKH[index].unbind(0)
        if self.scales_L2BSK is None:
            return LayerCache(keys, values)
        key_scales, value_scales = self.scales_L2BSK[index].unbind(0)
        return LayerCache(keys, values, key_scales, value_scales)

    def offload(self, block_id: int, slot: Tensor) -> None:
        """Copy a block, all its layers, bit-exact, into a slot of a host tier.

        Args:
            block_id: Of this cache.
            slot: uint8 [block_nbytes], contiguous, on the host; the caller's.
        """
        # One block at a time: gathering several by index took three times as long (35 us a block
        # of 200 KB like this).
        for chunk, part in zip(self.chunks(block_id), self._split(slot), strict=True):
            part.copy_(chunk)

    def restore(self, slot: Tensor, block_id: int) -> None:
        """Replace a block by what `offload` copied into a slot."""
        for chunk, part in zip(self.chunks(block_id), self._split(slot), strict=True):
            chunk.copy_(part)

    def chunks(self, block_id: int) -> list[Tensor]:
        """Return views of a block's numbers and scales, uint8 [layers x 2, bytes of each]."""
        return [part[:, block_id] for part in self._bytes]

    def _split(self, slot: Tensor) -> list[Tensor]:
        """Return a slot's bytes in the shapes of `chunks`."""
        sizes = [part[:, 0].numel() for part in self._bytes]
        parts = torch.split(slot, sizes)
        return [part.view(len(of), -1) for part, of in zip(parts, self._bytes, strict=True)]
