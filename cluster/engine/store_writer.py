"""Which blocks of one replica are to be written to the store, and when: a bounded way out.

    wanted ──in the host tier, held──► staged ──write──► putting ──ended──► believed to be there
       └───────────── too many, or in no tier any more ──► dropped, and counted

What is dropped is wanted again at its next use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice

from cluster.clock import Clock
from cluster.engine.host_tier import HostTier

MAX_WANTED_BLOCKS = 4096
MAX_BELIEVED_BLOCKS = 2**17
MAX_LOOK = 256
"""Wanted blocks that one step looks at."""

REFRESH_S = 60.0


class StoreWriter:
    """The blocks on their way from host tier to store.

    Args:
        host: Holds them until they are written.
        clock: Of the engine.
        max_put_blocks: On their way at once.
        piece_blocks: In one call.
        refresh_s: A block that is used locally is touched in the store this often: there it stays
            valuable, and where it was lost it is written again.
    """

    def __init__(
        self,
        host: HostTier,
        clock: Clock,
        *,
        max_put_blocks: int,
        piece_blocks: int,
        refresh_s: float = REFRESH_S,
    ) -> None:
        self.num_rejected = 0
        self._refresh_s = refresh_s
        self._host = host
        self._clock = clock
        self._max_put_blocks = max_put_blocks
        self._piece_blocks = piece_blocks
        self._wanted: OrderedDict[bytes, bool] = OrderedDict()  # hash -> whether it is pinned
        self._staged: dict[bytes, None] = {}  # wanted ones that the host tier holds
        self._putting: set[bytes] = set()  # held too
        self._believed: OrderedDict[bytes, float] = OrderedDict()  # hash -> when it was seen there

    @property
    def num_stageable(self) -> int:
        """Blocks that `stage` may still take: they share the host tier with what is used there."""
        return max(1, self._host.num_slots // 2) - len(self._staged) - len(self._putting)

    def want(self, block_hash: bytes, *, is_pinned: bool) -> None:
        """Let a block be written, unless it was seen in the store lately."""
        seen_s = self._believed.get(block_hash)
        if seen_s is not None and self._clock.now() - seen_s < self._refresh_s and not is_pinned:
            return
        if block_hash not in self._wanted and len(self._wanted) >= MAX_WANTED_BLOCKS:
            # Not an older one: that would be the head of a chain, without which the rest is lost.
            self.num_rejected += 1
            return
        self._wanted[block_hash] = is_pinned or self._wanted.get(block_hash, False)

    def is_pending(self, block_hash: bytes) -> bool:
        """Return whether a block is wanted or on its way, so that it may still be written."""
        return block_hash in self._wanted or block_hash in self._putting

    def unstaged(self) -> list[bytes]:
        """Return the next blocks to stage, in the order in which they were wanted."""
        wanted = islice(self._wanted, MAX_LOOK)
        return [h for h in wanted if h not in self._staged and h not in self._putting]

    def stage(self, block_hash: bytes) -> None:
        """Hold a wanted block, which the host tier has or is about to, until it is written."""
        self._host.hold(block_hash)
        self._staged[block_hash] = None

    def drop(self, block_hash: bytes) -> None:
        """Give up a wanted block that is in no tier any more, and count it."""
        self.num_rejected += 1
        self.forget(block_hash)

    def forget(self, block_hash: bytes) -> None:
        """Want a block no more."""
        self._wanted.pop(block_hash, None)
        if block_hash in self._staged:
            self._unstage(block_hash)

    def unstage_all(self) -> None:
        """Let go of what is staged; it stays wanted."""
        for block_hash in list(self._staged):
            self._unstage(block_hash)

    def take_pieces(self, max_pieces: int) -> list[tuple[tuple[bytes, ...], bool]]:
        """Return what to write now: blocks of one call each, and whether they are pinned.

        They are on their way until `put_ended`.
        """
        room = self._max_put_blocks - len(self._putting)
        ready: dict[bool, list[bytes]] = {False: [], True: []}
        for block_hash in islice(filter(self._host.is_filled, self._staged), max(0, room)):
            ready[self._wanted[block_hash]].append(block_hash)
        pieces = [
            (tuple(hashes[start : start + self._piece_blocks]), is_pinned)
            for is_pinned, hashes in ready.items()
            for start in range(0, len(hashes), self._piece_blocks)
        ][: max(0, max_pieces)]
        for hashes, _ in pieces:
            self._begin(hashes)
        return pieces

    def take_any(self) -> bytes | None:
        """Return some block to write now, to see whether that works; None if there is none."""
        block_hash = self._host.some_filled()
        if block_hash is None or block_hash in self._putting:
            return None
        self._wanted.setdefault(block_hash, False)
        if block_hash not in self._staged:
            self.stage(block_hash)
        self._begin((block_hash,))
        return block_hash

    def put_ended(self, hashes: Iterable[bytes], found: Iterable[bool]) -> None:
        """Let go of blocks that were on their way.

        Args:
            hashes: Of one call.
            found: Which of them the store has now.
        """
        now_s = self._clock.now()
        for block_hash, is_there in zip(hashes, found, strict=True):
            self._putting.remove(block_hash)
            self._host.release(block_hash)
            self.believe(block_hash, now_s if is_there else None)

    def believe(self, block_hash: bytes, seen_s: float | None) -> None:
        """Remember when a block was seen in the store; None: that it was not there."""
        self._believed.pop(block_hash, None)
        if seen_s is not None:
            self._believed[block_hash] = seen_s
            if len(self._believed) > MAX_BELIEVED_BLOCKS:
                self._believed.popitem(last=False)

    def doubt(self) -> None:
        """Believe nothing of the store any more: it was out of reach, and may have been emptied."""
        self._believed.clear()

    def clear(self) -> None:
        """Forget what is wanted and what is believed to be in the store."""
        for block_hash in list(self._wanted):
            self.forget(block_hash)
        self._believed.clear()

    def check_invariants(self, putting: list[bytes]) -> None:
        """Assert that the books agree with the blocks of the calls under way."""
        assert len(putting) == len(self._putting) and set(putting) == self._putting, "put twice"
        assert self._staged.keys() <= self._wanted.keys()
        assert not self._staged.keys() & self._putting
        assert all(block_hash in self._host for block_hash in (*self._staged, *putting))

    def _begin(self, hashes: Iterable[bytes]) -> None:
        for block_hash in hashes:  # what held it while it was staged holds it on
            del self._wanted[block_hash], self._staged[block_hash]
            self._putting.add(block_hash)

    def _unstage(self, block_hash: bytes) -> None:
        del self._staged[block_hash]
        self._host.release(block_hash)
