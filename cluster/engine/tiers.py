"""The tiers below one replica's KV cache, as engine and scheduler see them.

    KV cache ──evicted, or worth storing──► host tier ──worth storing──► store
       ▲                                      ▲   │                        │
       └────────────────fill─────────────────────┘  └─────────GET─────────┘

A block is worth storing when it was asked for `store.kv_write_after_uses` times, or belongs to a
registered prefix: unique prompts never reach the store. It is written when that is known, not when
it is evicted, so that other replicas find it while this one still uses it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict

from cluster.config import StoreConfig
from cluster.engine.fetch_plan import WORTH_IT, prefill_seconds
from cluster.engine.host_tier import HostTier
from cluster.engine.prefix_cache import PrefixCache
from cluster.engine.sequence import Sequence
from cluster.engine.store_tier import StoreTier
from cluster.types import CacheLoad, StepCost, StepShape, StoreState

COPY_BYTES_PER_S = 4e9
"""Of a copy between KV cache and host tier, at the least: what a core copies, or a PCIe 3 bus."""

MAX_COPY_SHARE = 0.01  # of a step in which somebody decodes
MAX_COPY_BYTES = 64 * 2**20  # of another step
ASSUMED_STEP_S = 0.005  # before one was measured


class Tiers:
    """Host tier and store of one replica.

    Args:
        cache: The KV cache above.
        host: The host tier.
        store: The store; None is none.
        config: What is worth storing.
        block_size: Tokens per block.
        block_nbytes: Of one worker's part, the largest.
        step_tokens: Prompt tokens that one step may take.
    """

    def __init__(
        self,
        cache: PrefixCache,
        host: HostTier,
        store: StoreTier | None,
        config: StoreConfig,
        *,
        block_size: int,
        block_nbytes: int,
        step_tokens: int,
    ) -> None:
        self.store = store
        self.num_host_hit_tokens = 0
        self.num_store_hit_tokens = 0
        self.saved_s = 0.0
        self._cache = cache
        self._host = host
        self._config = config
        self._block_size = block_size
        self._block_nbytes = block_nbytes
        self._step_tokens = step_tokens
        # No more than stays in the host tier, or they would chase each other out of it.
        self._num_ahead = min(4 * max(1, step_tokens // block_size), host.num_slots // 4)
        self._credit_bytes = 0.0
        self._may_copy = False

    @property
    def has_copies(self) -> bool:
        """Whether a step could copy blocks that are to be stored."""
        if self.store is None or not self._may_copy:
            return False
        # Where writes fail, one block is brought here, so that there is one to try with.
        return self.store.is_writable or not self._host.num_blocks

    def copy_seconds(self, num_blocks: int) -> float:
        """Return how long copies take, at the most, as a part of their step."""
        return num_blocks * self._block_nbytes / COPY_BYTES_PER_S

    def begin_step(self, decodes: Iterable[Sequence], cost: StepCost | None) -> None:
        """Say how many blocks the next step may copy to the host tier: few where somebody decodes.

        Args:
            decodes: Those who take part in the step so far.
            cost: Of a step; None is not known.
        """
        most = max(1, MAX_COPY_BYTES // self._block_nbytes)
        self._cache.max_offloads = self._cache.max_restores = most
        contexts = [sequence.num_computed_tokens for sequence in decodes]
        if not contexts:
            return
        shape = StepShape(len(contexts), len(contexts), sum(contexts))
        step_s = cost.seconds(shape) if cost is not None else ASSUMED_STEP_S
        # What one block is too much for is saved up, so that large blocks move too.
        self._credit_bytes = min(self._credit_bytes, float(self._block_nbytes))
        self._credit_bytes += MAX_COPY_SHARE * step_s * COPY_BYTES_PER_S
        self._cache.max_offloads = int(self._credit_bytes // self._block_nbytes)
        self._credit_bytes -= self._cache.max_offloads * self._block_nbytes

    def limit_restores(self, slack_s: float) -> None:
        """Say how many blocks may come back: a prompt's work, which its step's objective bounds.

        Args:
            slack_s: What is left of the step's time, seconds; inf is no bound.
        """
        if slack_s < math.inf:
            num_blocks = int(max(0.0, slack_s) * COPY_BYTES_PER_S / self._block_nbytes)
            self._cache.max_restores = min(self._cache.max_restores, max(1, num_blocks))

    def begin(self, sequence: Sequence, cost: StepCost | None) -> None:
        """Ask the store for what a new prompt misses here."""
        if self.store is None or not self._cache.is_enabled:
            return
        num_blocks = sequence.num_matchable_blocks
        start = 0
        while start < num_blocks and self._cache.has(sequence.block_hash(start)):
            start += 1
        hashes = [sequence.block_hash(index) for index in range(start, num_blocks)]
        sequence.fetch = self.store.find(hashes, start, cost)

    def note_prompt(self, sequence: Sequence) -> None:
        """Count a use of a prompt's blocks, when it is admitted for the first time."""
        for index in range(sequence.num_prompt_tokens // self._block_size):
            block_hash = sequence.block_hash(index)
            self._host.uses.add(block_hash)
            self._host.use(block_hash)
            if self._cache.has(block_hash):
                self.note_block(sequence, index)

    def note_block(self, sequence: Sequence, index: int) -> None:
        """Let a block of a sequence that some tier has be stored, if it is worth it."""
        if self.store is None or (index + 1) * self._block_size > sequence.num_prompt_tokens:
            return
        block_hash, is_pinned = sequence.block_hash(index), sequence.request.pins_prefix
        if is_pinned or self._host.uses.uses(block_hash) >= self._config.kv_write_after_uses:
            self.store.writer.want(block_hash, is_pinned=is_pinned)
            self._may_copy = True

    def store_all(self, sequence: Sequence, cost: StepCost | None) -> list[bytes]:
        """Let every full block of a sequence be stored, so that another replica goes on with it.

        Args:
            sequence: That runs here; its answer's blocks are stored too.
            cost: Of a step; None is not known.

        Returns:
            The blocks that are to be written; none where computing them anew is not slower than
            reading them, or nothing is written at present.
        """
        store, num_blocks = self.store, sequence.num_registered_blocks
        if store is None or cost is None or not store.is_writable or not num_blocks:
            return []
        fetch_s = num_blocks * store.fetch_block_s
        computed_s = prefill_seconds(
            cost,
            num_blocks * self._block_size,
            num_computed_tokens=0,
            step_tokens=self._step_tokens,
        )[-1]
        if not 0 < fetch_s < WORTH_IT * computed_s:
            return []
        hashes = [sequence.block_hash(index) for index in range(num_blocks)]
        for block_hash in hashes:
            store.writer.want(block_hash, is_pinned=False)
        self._may_copy = True
        return [block_hash for block_hash in hashes if store.writer.is_pending(block_hash)]

    def is_stored(self, hashes: Iterable[bytes]) -> bool:
        """Return whether none of these blocks is to be written any more."""
        return self.store is None or not any(map(self.store.writer.is_pending, hashes))

    def note_hits(
        self, sequence: Sequence, first: int, end: int, *, waited_s: float, cost: StepCost | None
    ) -> None:
        """Count blocks `first` ... `end` - 1 of a sequence that came from below the KV cache.

        Args:
            sequence: Whose.
            first: Index in its chain.
            end: Likewise, exclusive.
            waited_s: For how long it computed nothing because of them.
            cost: Of a step; None is not known.
        """
        came = sequence.fetch.came if sequence.fetch is not None else ()
        num_fetched = sum(sequence.block_hash(index) in came for index in range(first, end))
        self.num_store_hit_tokens += num_fetched * self._block_size
        self.num_host_hit_tokens += (end - first - num_fetched) * self._block_size
        if cost is not None:
            computed_s = prefill_seconds(
                cost,
                (end - first) * self._block_size,
                num_computed_tokens=first * self._block_size,
                step_tokens=self._step_tokens,
            )[-1]
            self.saved_s += max(0.0, computed_s - waited_s)

    def note_late(self) -> None:
        """Count a sequence that goes on without what it has waited for."""
        if self.store is not None:
            self.store.counters.num_late += 1

    def plan_copies(self, *, has_prompts: bool) -> None:
        """Use what the next step may still copy: for the store, then for coming evictions.

        Args:
            has_prompts: Whether it computes prompts: these are what evicts many blocks at once.
        """
        if self.store is not None and self.has_copies:
            self._may_copy = self._copy_wanted(self.store)
        if has_prompts:
            self._cache.copy_oldest_to_host(self._num_ahead)

    def _copy_wanted(self, store: StoreTier) -> bool:
        """Bring blocks that are to be stored to the host tier; return whether more may follow."""
        writer = store.writer
        num_left = num_most = writer.num_stageable if store.is_writable else 1
        for block_hash in writer.unstaged():
            if not self._cache.has(block_hash):
                writer.drop(block_hash)
                continue
            if num_left <= 0 or not self._cache.copy_to_host(block_hash):
                break
            if store.is_writable:
                writer.stage(block_hash)
            num_left -= 1
        return num_left < num_most or self._cache.max_offloads <= 0

    def work(self, timeout_s: float, cost: StepCost | None) -> None:
        """Take results of moves, waiting `timeout_s` for the first, and begin new ones."""
        if self.store is None:
            return
        if self.store.collect(timeout_s, cost):
            self._may_copy = True  # slots may be free again
        self.store.write()
        self.store.probe()

    def flush(self) -> int:
        """Forget what no request uses, in KV cache and host tier; return how many blocks."""
        if self.store is not None:
            self.store.writer.clear()
        return self._cache.flush() + self._host.clear()

    def load(self) -> CacheLoad:
        """Return the state of the tiers."""
        counters = self.store.counters if self.store is not None else None
        return CacheLoad(
            store_state=self.store.state if self.store is not None else StoreState.OFF,
            num_host_slots=self._host.num_slots,
            num_host_blocks=self._host.num_blocks,
            num_host_hit_tokens=self.num_host_hit_tokens,
            num_store_hit_tokens=self.num_store_hit_tokens,
            num_device_evictions=self._cache.num_evictions,
            num_host_evictions=self._host.num_evictions,
            saved_s=self.saved_s,
            num_rejected=self.store.writer.num_rejected if self.store is not None else 0,
            **({} if counters is None else asdict(counters)),
        )
