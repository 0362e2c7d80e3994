"""What a block costs of a store's byte budget, and which blocks of a batch have a place in it."""

from __future__ import annotations

from collections.abc import Mapping

BLOCK_OVERHEAD_BYTES = 256
"""What a stored block takes beyond its payload: key, frame, places in the indexes.

Counted so that a million empty blocks are not free.
"""


def block_cost(payload: bytes) -> int:
    """Return the bytes that a block counts in `StoreConfig.max_bytes`."""
    return len(payload) + BLOCK_OVERHEAD_BYTES


def newest_that_fit(blocks: Mapping[bytes, bytes], max_bytes: int) -> dict[bytes, bytes]:
    """Return what is left of a batch after it was written to an empty LRU cache of `max_bytes`.

    A block that is larger than the budget is left out; of the others the longest suffix that fits
    stays, in order. With it, a batch never evicts its own blocks.
    """
    kept: list[tuple[bytes, bytes]] = []
    num_bytes = 0
    for key, payload in reversed(list(blocks.items())):
        cost = block_cost(payload)
        if cost > max_bytes:
            continue
        num_bytes += cost
        if num_bytes > max_bytes:
            break
        kept.append((key, payload))
    return dict(reversed(kept))
