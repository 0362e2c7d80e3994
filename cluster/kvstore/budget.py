"""What a block takes of its store's byte budget, and a journal of its own one.

In Redis that is more than its payload: the allocator rounds large values up by as much as a quarter
(jemalloc has four sizes per power of two), and each block has a key, a frame and its places in the
indexes. The embedded store counts alike, so that a budget means one thing.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.kvstore.codec import HEADER_BYTES

FRAME_BYTES = HEADER_BYTES + 26 + 12  # of a value: codec.py, the key in it, the string's own header
BLOCK_OVERHEAD_BYTES = 576
"""Beyond the value: key, TTL, order, books.

Measured on Redis 7.0 with jemalloc: 510 bytes a block, with a namespace of six letters.
"""

JOURNAL_OVERHEAD_BYTES = 640  # of a journal without entries: key, owner, TTL, order, books
ENTRY_OVERHEAD_BYTES = 32
"""Of one entry.

Measured like that of blocks: 600 bytes a journal with ids of 36 letters, 27 an entry of 300 bytes,
4 one of 20 bytes; from 8 KiB on the allocator rounds each entry up, by a quarter at most.
"""


def block_cost(num_payload_bytes: int) -> int:
    """Return the bytes that a block counts in `StoreConfig.max_bytes`."""
    return _allocated(num_payload_bytes + FRAME_BYTES) + BLOCK_OVERHEAD_BYTES


def entries_cost(entries: Sequence[bytes]) -> int:
    """Return the bytes that entries of a journal count in `StoreConfig.journal_bytes`."""
    return sum(map(len, entries)) + ENTRY_OVERHEAD_BYTES * len(entries)


def _allocated(num_bytes: int) -> int:
    """Return what jemalloc takes for `num_bytes`: the next of four sizes per power of two."""
    step = max(16, 1 << max(0, (num_bytes - 1).bit_length() - 3))
    return -(-num_bytes // step) * step
