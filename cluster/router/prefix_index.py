"""Which replica holds which cached block: subscribed from the leaders, never stored.

A block is known by its router key, 64 bit of its place in the chain of block hashes, so that equal
keys mean equal prefixes and the longest cached prefix is the longest run of known keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_BYTES_PER_BLOCK = 100  # an int of 36 bytes and its places in a set that is 30 to 60 % full


class PrefixIndex:
    """The cached blocks of every connected replica."""

    def __init__(self) -> None:
        self._blocks: dict[str, set[int]] = {}

    @property
    def num_bytes(self) -> int:
        """Estimate of the memory that the index takes, bytes."""
        return _BYTES_PER_BLOCK * sum(len(blocks) for blocks in self._blocks.values())

    def num_blocks(self, replica_id: str) -> int:
        """Return how many blocks of a replica are known; 0 for an unknown replica."""
        return len(self._blocks.get(replica_id, ()))

    def replace(self, replica_id: str, keys: Iterable[int]) -> None:
        """Take a snapshot: whatever was known of the replica before is forgotten."""
        self._blocks[replica_id] = set(keys)

    def apply(self, replica_id: str, *, added: Iterable[int], removed: Iterable[int]) -> None:
        """Take a delta, which follows a snapshot; removals happen before additions."""
        blocks = self._blocks[replica_id]
        blocks.difference_update(removed)
        blocks.update(added)

    def drop(self, replica_id: str) -> None:
        """Forget a replica; unknown already is fine."""
        self._blocks.pop(replica_id, None)

    def longest_prefix(self, replica_id: str, keys: Sequence[int]) -> int:
        """Return how many leading blocks of a prompt the replica holds."""
        blocks = self._blocks.get(replica_id)
        if not blocks:
            return 0
        for index, key in enumerate(keys):
            if key not in blocks:
                return index
        return len(keys)
