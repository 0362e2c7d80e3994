"""What is read from the store and written to it, for one replica: decisions, no I/O.

    a prompt arrives ──FIND──► which of its missing blocks are there?
                          └──► fetch or recompute (fetch_plan.py) ──GET──► slots of the host tier
    a block is worth it ──────────────────────────────────────────PUT──► the store

Nothing waits for the store without a time after which it goes on alone, nothing queues for it
without a bound, and what fails is only slower. Two circuit breakers stand between: while reads
fail nobody waits, while writes fail nothing is written, and both try again by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from itertools import count

from cluster.clock import Clock
from cluster.config import StoreConfig
from cluster.engine.fetch_plan import TransferTime, first_fetched, prefill_seconds
from cluster.engine.host_tier import HostTier
from cluster.engine.mover import BlockMover, Move, MoveKind, MoveResult
from cluster.engine.store_writer import REFRESH_S, StoreWriter
from cluster.kvstore.breaker import BreakerState, CircuitBreaker
from cluster.types import StepCost, StoreState

MAX_FIND_BLOCKS = 4096
MAX_OPEN = {MoveKind.FIND: 32, MoveKind.GET: 32, MoveKind.PUT: 16}
"""Moves at once, of each kind: those that write leave those that read their places."""

MIN_HOLD_S = 0.02
PATIENCE = 4.0  # a fetch may take so many times what was predicted
FIND_SHARE, GET_SHARE = 0.1, 0.25
"""Of the computation that it may spare, a search or a fetch may always take so much."""

SILENCE_S = 0.5  # beyond the store's deadline: then a move without an answer counts as failed


@dataclass(slots=True)
class Fetch:
    """What a sequence has asked of the store; its blocks are numbered from its beginning."""

    start: int  # first block that is wanted, and computed by nobody
    end: int
    until_s: float  # then the sequence goes on without
    num_open: int = 0  # moves whose results have not come
    came: set[bytes] = field(default_factory=set)  # the blocks that came
    num_own: int = 0  # calls that were made for it and have not ended
    num_bytes: int = 0  # that these brought
    elapsed_s: float = 0.0  # of the slowest of these
    is_given_up: bool = False  # its sequence has ended, or went on without it


@dataclass(slots=True)
class StoreCounters:
    """Since start; meanings as in `types.CacheLoad`."""

    num_stored_blocks: int = 0
    num_fetched_blocks: int = 0
    stored_bytes: int = 0
    fetched_bytes: int = 0
    num_late: int = 0
    num_failed: int = 0
    num_corrupt: int = 0


@dataclass(slots=True)
class _Open:
    """A move whose result has not come."""

    move: Move
    fetches: list[Fetch] = field(default_factory=list)  # that wait for it
    position: int = 0  # of a GET's first block in its chain, about
    is_preload: bool = False
    overdue_s: float = math.inf  # then the mover is silent


class StoreTier:
    """Talks to one replica's mover.

    Args:
        mover: Moves the blocks.
        host: Where they come from and arrive.
        config: Limits and times.
        clock: Of the engine.
        block_size: Tokens per block.
        block_nbytes: Of one worker's part, the largest.
        step_tokens: Prompt tokens that one step may take.
    """

    def __init__(
        self,
        mover: BlockMover,
        host: HostTier,
        config: StoreConfig,
        clock: Clock,
        *,
        block_size: int,
        block_nbytes: int,
        step_tokens: int,
    ) -> None:
        self.counters = StoreCounters()
        self.num_preloaded = 0  # blocks fetched for no sequence
        self._mover = mover
        self._host = host
        self._config = config
        self._clock = clock
        self._block_size = block_size
        self._block_nbytes = block_nbytes
        self._step_blocks = max(1, step_tokens // block_size)
        self._piece_blocks = max(1, config.kv_chunk_bytes // block_nbytes)
        self.writer = StoreWriter(
            host,
            clock,
            max_put_blocks=max(1, config.kv_inflight_bytes // block_nbytes),
            piece_blocks=self._piece_blocks,
            refresh_s=min(REFRESH_S, config.kv_ttl_s / 2),
        )
        self._reads = CircuitBreaker(clock)
        self._writes = CircuitBreaker(clock)
        self._times = TransferTime(clock)
        self._open: dict[int, _Open] = {}
        self._num_open = dict.fromkeys(MoveKind, 0)
        self._arriving: dict[bytes, _Open] = {}  # by each block that is fetched
        self._move_ids = count()

    @property
    def state(self) -> StoreState:
        """How the store does."""
        if self._reads.state is BreakerState.OPEN:
            return StoreState.OFF
        if self._reads.state is BreakerState.CLOSED and self.is_writable:
            return StoreState.EXACT
        return StoreState.DEGRADED

    @property
    def fetch_block_s(self) -> float:
        """Seconds per block of a prompt that is read; 0 while nothing is read."""
        if self._reads.state is not BreakerState.CLOSED:
            return 0.0
        return self._times.seconds(self._piece_blocks * self._block_nbytes) / self._piece_blocks

    @property
    def is_writable(self) -> bool:
        """Whether anything is written at present."""
        return self._writes.state is BreakerState.CLOSED

    @property
    def num_preloading(self) -> int:
        """Blocks that are fetched for no sequence."""
        return sum(
            len(item.move.hashes)
            for item in self._open.values()
            if item.move.kind is MoveKind.GET and item.is_preload
        )

    def find(self, hashes: Ordered[bytes], start: int, cost: StepCost | None) -> Fetch | None:
        """Ask which blocks of a prompt are there; return what its sequence may wait for.

        Args:
            hashes: Of the blocks that are missing here, in order.
            start: Index of the first one in its sequence.
            cost: Of a step; None is not known.

        Returns:
            None where asking would not pay, or the store is not asked at present.
        """
        hashes = tuple(hashes[:MAX_FIND_BLOCKS])
        if not hashes or not self._room(MoveKind.FIND) or not self._host.num_available:
            return None
        computed_s = 0.0
        if cost is not None:
            computed_s = self._prefill_s(cost, len(hashes), start)[-1]
            if self._times.seconds(self._block_nbytes) > computed_s:
                return None
        hold_s = max(MIN_HOLD_S, PATIENCE * self._times.latency_s, FIND_SHARE * computed_s)
        if not self._reads.allow():
            return None
        fetch = Fetch(start, start + len(hashes), self._clock.now() + self._bound(hold_s))
        move = Move(next(self._move_ids), MoveKind.FIND, hashes)
        self._begin(_Open(move, [fetch]))
        return fetch

    def preload(self, hashes: Ordered[bytes]) -> None:
        """Fetch blocks into slots that are free, for whoever comes."""
        if self._reads.allow():
            self._get(hashes, 0, None)

    def write(self) -> None:
        """Begin to write what is staged, as much as may be under way."""
        if self.is_writable:
            for hashes, is_pinned in self.writer.take_pieces(self._room(MoveKind.PUT)):
                self._put(hashes, is_pinned=is_pinned)

    def probe(self) -> None:
        """Where reads or writes have failed, try one, as soon as it is time to."""
        if self._reads.state is not BreakerState.CLOSED and self._reads.allow():
            self._begin(_Open(Move(next(self._move_ids), MoveKind.FIND, ())))
        if not self.is_writable and self._writes.allow():
            block_hash = self.writer.take_any()
            if block_hash is not None:
                self._put((block_hash,), is_pinned=False)

    def collect(self, timeout_s: float, cost: StepCost | None) -> bool:
        """Take the results that are there; wait up to `timeout_s` seconds for the first.

        Returns:
            Whether there was one.
        """
        results = self._mover.collect(timeout_s) if self._open else []
        for result in results:
            item = self._open.pop(result.move_id)
            self._num_open[item.move.kind] -= 1
            self.counters.num_corrupt += result.num_corrupt
            if result.error:
                self.counters.num_failed += 1
            if item.move.kind is MoveKind.PUT:
                self._put_ended(item.move, result)
            elif item.move.kind is MoveKind.GET:
                self._get_ended(item, result)
            else:
                self._find_ended(item, result, cost)
        self._note_silence()
        return bool(results)

    def _note_silence(self) -> None:
        """Count a move as failed whose answer should long have come; it may come still."""
        oldest = next(iter(self._open.values()), None)
        now_s = self._clock.now()
        if oldest is None or now_s < oldest.overdue_s:
            return
        oldest.overdue_s = now_s + self._config.timeout_s
        is_write = oldest.move.kind is MoveKind.PUT
        (self._writes if is_write else self._reads).failed()

    def check_invariants(self) -> None:
        """Assert that the books agree with the moves under way."""
        puts = [i.move for i in self._open.values() if i.move.kind is MoveKind.PUT]
        self.writer.check_invariants([h for move in puts for h in move.hashes])
        gets = [i.move for i in self._open.values() if i.move.kind is MoveKind.GET]
        assert sorted(self._arriving) == sorted(h for move in gets for h in move.hashes)
        for kind, limit in MAX_OPEN.items():
            num_open = sum(item.move.kind is kind for item in self._open.values())
            assert num_open == self._num_open[kind] <= limit + 1, "more than a probe beyond it"

    def _room(self, kind: MoveKind) -> int:
        return max(0, MAX_OPEN[kind] - self._num_open[kind])

    def _begin(self, item: _Open) -> None:
        item.overdue_s = self._clock.now() + self._config.timeout_s + SILENCE_S
        self._open[item.move.move_id] = item
        self._num_open[item.move.kind] += 1
        for fetch in item.fetches:
            fetch.num_open += 1
        self._mover.submit(item.move)

    def _get(self, hashes: Ordered[bytes], position: int, fetch: Fetch | None) -> int:
        """Begin to fetch a chain's blocks, in pieces; return how many are here or will come.

        What is here already is not fetched, what is on its way is waited for.

        Args:
            hashes: In order.
            position: Of the first of them in its chain.
            fetch: Waits for them; None is a preload.
        """
        new: list[tuple[bytes, int]] = []
        num_most = self._room(MoveKind.GET) * self._piece_blocks
        num_coming = 0
        for block_hash in hashes:
            if (item := self._arriving.get(block_hash)) is not None:
                self._join(item, fetch)
            elif block_hash not in self._host:
                slot = self._host.reserve() if len(new) < num_most else None
                if slot is None:
                    break
                new.append((block_hash, slot))
            num_coming += 1
        for start in range(0, len(new), self._piece_blocks):
            names, slots = zip(*new[start : start + self._piece_blocks], strict=True)
            move = Move(next(self._move_ids), MoveKind.GET, names, slots)
            fetches = [] if fetch is None else [fetch]
            for other in fetches:
                other.num_own += 1
            item = _Open(move, fetches, position=position + start, is_preload=fetch is None)
            self._arriving |= dict.fromkeys(names, item)
            self._begin(item)
        return num_coming

    def _join(self, item: _Open, fetch: Fetch | None) -> None:
        if fetch is not None and all(other is not fetch for other in item.fetches):
            item.fetches.append(fetch)
            fetch.num_open += 1

    def _put(self, hashes: tuple[bytes, ...], *, is_pinned: bool) -> None:
        slots = tuple(map(self._host.slot_of, hashes))
        self._begin(_Open(Move(next(self._move_ids), MoveKind.PUT, hashes, slots, is_pinned)))

    def _put_ended(self, move: Move, result: MoveResult) -> None:
        self._report(self._writes, result)
        self.writer.put_ended(move.hashes, result.found)
        if not self.is_writable:  # the host tier is not for what cannot leave it
            self.writer.unstage_all()
        self.counters.stored_bytes += result.num_bytes
        self.counters.num_stored_blocks += result.num_bytes // self._block_nbytes

    def _get_ended(self, item: _Open, result: MoveResult) -> None:
        self._report(self._reads, result)
        move, came, now_s = item.move, set(), self._clock.now()
        for index, block_hash in enumerate(move.hashes):
            del self._arriving[block_hash]
            if result.found[index]:
                self._host.commit(move.slots[index], block_hash, position=item.position + index)
                came.add(block_hash)
            else:
                self._host.cancel(move.slots[index])
            self.writer.believe(block_hash, now_s if result.found[index] else None)
        self.counters.num_fetched_blocks += len(came)
        self.counters.fetched_bytes += result.num_bytes
        if item.is_preload:
            self.num_preloaded += len(came)
        for fetch in item.fetches:
            fetch.num_open -= 1
            fetch.came |= came
        if not item.is_preload:
            self._observe(item.fetches[0], result)

    def _observe(self, fetch: Fetch, result: MoveResult) -> None:
        """Learn how long a fetch takes: all of its calls together, for they run side by side."""
        fetch.num_own -= 1
        fetch.num_bytes += result.num_bytes
        fetch.elapsed_s = max(fetch.elapsed_s, result.elapsed_s)
        if not fetch.num_own:
            self._times.observe_transfer(fetch.num_bytes, fetch.elapsed_s)

    def _find_ended(self, item: _Open, result: MoveResult, cost: StepCost | None) -> None:
        self._report(self._reads, result)
        if not item.fetches:  # a probe
            return
        (fetch,), hashes = item.fetches, item.move.hashes
        fetch.num_open -= 1
        if result.error:
            return
        self._times.observe_latency(result.elapsed_s)
        num_there = (*result.found, False).index(False)
        for block_hash in hashes[num_there:]:
            self.writer.believe(block_hash, None)
        # However late the answer is seen: who still waits has lost nothing by it.
        if not num_there or fetch.is_given_up:
            return
        first, computed_s = 0, 0.0
        if cost is not None:
            prefill_s = self._prefill_s(cost, num_there, fetch.start)
            border = first_fetched(
                prefill_s,
                num_blocks=num_there,
                step_blocks=self._step_blocks,
                block_s=self._block_nbytes / self._times.bytes_per_s,
                latency_s=self._times.latency_s,
            )
            if border is None:
                return
            first, computed_s = border, prefill_s[-1] - prefill_s[border // self._step_blocks]
        hold_s = max(
            MIN_HOLD_S,
            PATIENCE * self._times.seconds((num_there - first) * self._block_nbytes),
            GET_SHARE * computed_s,
        )
        fetch.start += first
        fetch.until_s = self._clock.now() + self._bound(hold_s)
        fetch.end = fetch.start + self._get(hashes[first:num_there], fetch.start, fetch)

    def _prefill_s(self, cost: StepCost, num_blocks: int, start: int) -> list[float]:
        size = self._block_size
        return prefill_seconds(
            cost,
            num_blocks * size,
            num_computed_tokens=start * size,
            step_tokens=self._step_blocks * size,
        )

    def _bound(self, hold_s: float) -> float:
        return min(hold_s, self._config.timeout_s)

    def _report(self, breaker: CircuitBreaker, result: MoveResult) -> None:
        if result.error:
            breaker.failed()
            return
        if breaker.state is not BreakerState.CLOSED:
            self.writer.doubt()
        breaker.succeeded()
