"""Which blocks a replica has, in whatever tier, and what changed since somebody last looked."""

from __future__ import annotations


class BlockEvents:
    """Counts the tiers that hold each hash; a router hears of the first one and of the last.

    What changed is kept as ordered sets: a hash that came and went in between is in neither, so
    they never outgrow what the tiers hold or held at the last look.
    """

    def __init__(self) -> None:
        self._num_tiers: dict[bytes, int] = {}
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def enter(self, block_hash: bytes) -> None:
        """Note that one more tier holds a block."""
        num_tiers = self._num_tiers.get(block_hash, 0)
        self._num_tiers[block_hash] = num_tiers + 1
        if num_tiers == 0:
            self._note(block_hash, self._added, self._removed)

    def leave(self, block_hash: bytes) -> None:
        """Note that a tier that held a block holds it no more."""
        num_tiers = self._num_tiers[block_hash] - 1
        if num_tiers:
            self._num_tiers[block_hash] = num_tiers
            return
        del self._num_tiers[block_hash]
        self._note(block_hash, self._removed, self._added)

    def take(self) -> tuple[list[bytes], list[bytes]]:
        """Return the hashes added and removed since the last call, each in order.

        An index that removes and adds these equals `hashes()`.
        """
        events = list(self._added), list(self._removed)
        self._added.clear()
        self._removed.clear()
        return events

    def hashes(self) -> list[bytes]:
        """Return the hashes of all blocks, in the order in which they were entered."""
        return list(self._num_tiers)

    def check_invariants(self) -> None:
        """Assert that the events are about what is there, and what is not."""
        assert all(count > 0 for count in self._num_tiers.values())
        assert self._added.keys() <= self._num_tiers.keys()
        assert not self._removed.keys() & self._num_tiers.keys()

    @staticmethod
    def _note(block_hash: bytes, into: dict[bytes, None], opposite: dict[bytes, None]) -> None:
        """Note an event, or undo the opposite one that nobody has seen yet."""
        if block_hash in opposite:
            del opposite[block_hash]
        else:
            into[block_hash] = None
