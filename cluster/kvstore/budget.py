"""What a block takes of a store's byte budget.

In Redis that is more than its payload: the allocator rounds large values up by as much as a quarter
(jemalloc has four sizes per power of two), and each block has a key, a frame and its places in the
indexes. The embedded store counts alike, so that a budget means one thing.
"""

from __future__ import annotations

from cluster.kvstore.codec import HEADER_BYTES

FRAME_BYTES = HEADER_BYTES + 26 + 12  # of a value: codec.py, the key in it, the string's own header
BLOCK_OVERHEAD_BYTES = 576
"""Beyond the value: key, TTL, order, books.

Measured on Redis 7.0 with jemalloc: 510 bytes a block, with a namespace of six letters.
"""


def block_cost(num_payload_bytes: int) -> int:
    """Return the bytes that a block counts in `StoreConfig.max_bytes`."""
    return _allocated(num_payload_bytes + FRAME_BYTES) + BLOCK_OVERHEAD_BYTES


def _allocated(num_bytes: int) -> int:
    """Return what jemalloc takes for `num_bytes`: the next of four sizes per power of two."""
    step = max(16, 1 << max(0, (num_bytes - 1).bit_length() - 3))
    return -(-num_bytes // step) * step
