"""Who holds which KV block: reference counts, a free list, and an LRU list of kept blocks.

    free ──allocate──► referenced ──release(keep=False)──► free
                        ▲   │
                 acquire│   └──release(keep=True)──► kept, oldest first ──allocate──► referenced
                        └──────────────────────────────┘

A kept block is referenced by nobody, but what is in it may be of use: it is given away only when
no free block is left. The pool knows numbers, not contents: prefix_cache.py knows these.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice


class BlockPool:
    """The blocks of one replica, `0 .. num_blocks - 1`; every operation takes constant time.

    Args:
        num_blocks: Blocks in the KV cache of every worker, >= 1.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, f"{num_blocks=}"
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free or kept."""
        return len(self._free) + len(self._kept)

    def ref_count(self, block: int) -> int:
        """Return how many references `block` has."""
        return self._ref_counts[block]

    def allocate(self) -> int:
        """Return a block with one reference: a free one, else the one that was kept longest."""
        assert self.num_free, "no block is free: ask num_free first"
        block = self._free.pop() if self._free else self._kept.popitem(last=False)[0]
        self._ref_counts[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """Add a reference to a block that is referenced or kept."""
        if self._ref_counts[block] == 0:
            del self._kept[block]
        self._ref_counts[block] += 1

    def release(self, block: int, *, keep: bool) -> None:
        """Take a reference away.

        Args:
            block: Has at least one reference.
            keep: Whether its content is worth keeping once nobody references it.
        """
        assert self._ref_counts[block] > 0, f"{block=} is released more often than acquired"
        self._ref_counts[block] -= 1
        if self._ref_counts[block]:
            return
        if keep:
            self._kept[block] = None
        else:
            self._free.append(block)

    def oldest_kept(self, num_blocks: int) -> list[int]:
        """Return the kept blocks that are given away next, if no more than these are free."""
        num_next = num_blocks - len(self._free)
        return list(islice(self._kept, num_next)) if num_next > 0 else []

    def free_kept(self) -> list[int]:
        """Free every kept block; return them."""
        blocks = list(self._kept)
        self._kept.clear()
        self._free += reversed(blocks)
        return blocks

    def check_invariants(self) -> None:
        """Assert that every block is in exactly one of: free, kept, referenced."""
        free, kept = set(self._free), set(self._kept)
        referenced = {block for block, count in enumerate(self._ref_counts) if count}
        assert min(self._ref_counts) >= 0
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & kept and not free & referenced and not kept & referenced
        assert len(free) + len(kept) + len(referenced) == self.num_blocks, "a block is lost"
