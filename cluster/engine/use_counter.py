"""How often each block was asked for, remembered beyond its life in any tier."""

from __future__ import annotations

from collections import OrderedDict


class UseCounter:
    """Uses per hash; of many hashes those that were used last are remembered.

    Args:
        max_hashes: To remember; about 150 bytes each.
    """

    def __init__(self, max_hashes: int) -> None:
        assert max_hashes >= 1, f"{max_hashes=}"
        self._max_hashes = max_hashes
        self._uses: OrderedDict[bytes, int] = OrderedDict()

    def add(self, block_hash: bytes) -> int:
        """Count a use; return how many there were, this one included."""
        uses = self._uses.pop(block_hash, 0) + 1
        self._uses[block_hash] = uses
        if len(self._uses) > self._max_hashes:
            self._uses.popitem(last=False)
        return uses

    def uses(self, block_hash: bytes) -> int:
        """Return how many uses are remembered."""
        return self._uses.get(block_hash, 0)
