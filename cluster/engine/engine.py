"""The step loop of one replica: requests in, tokens out.

    add ──► scheduler ──► plan ──► executor.submit      up to max_in_flight steps
                                        │
    outputs ◄── apply ◄── executor.collect              one per call of step()

Nothing here waits but `executor.collect` and, where every sequence waits for blocks from the store,
`mover.collect`, for 5 ms; the caller owns the thread, and calls are not reentrant.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from cluster.clock import Clock
from cluster.config import EngineConfig, StoreConfig
from cluster.engine.block_events import BlockEvents
from cluster.engine.block_pool import BlockPool
from cluster.engine.executor import Executor
from cluster.engine.host_tier import HostTier
from cluster.engine.mover import BlockMover
from cluster.engine.prefix_cache import PrefixCache
from cluster.engine.scheduler import Batch, Chunk, Scheduler
from cluster.engine.sequence import ModelTraits, Sequence, SequenceState, check_request
from cluster.engine.step_time import StepTimeModel
from cluster.engine.store_tier import StoreTier
from cluster.engine.tiers import Tiers
from cluster.engine.use_counter import UseCounter
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.step import BlockMoves, StepPlan, StepResult
from cluster.types import (
    CacheLoad,
    EngineOutput,
    EngineRequest,
    FinishReason,
    ReplicaLoad,
    SampledToken,
)

MOVES_WAIT_S = 0.005
"""For blocks from the store, where there is nothing else to do."""

MIN_USES_REMEMBERED = 2**16  # blocks

HAND_OVER_S = 1.0
"""For so long a sequence that is handed over goes on here, while its blocks are stored."""


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    step_id: int
    batch: Batch
    moves: BlockMoves
    held: list[bytes]  # blocks of the host tier that it copies


@dataclass(frozen=True, slots=True)
class _Leaving:
    until_s: float
    hashes: list[bytes]  # of its blocks that are being stored


class Engine:
    """Serves requests on one executor: continuous batching over a paged, prefix-cached KV cache.

    Args:
        config: Limits of a step and of the queue.
        executor: Computes the steps; the caller shuts it down.
        block_size: Tokens per KV block.
        max_model_len: Tokens that a prompt and its answer may have together.
        fingerprint: Of weights, dtype and layout; seeds the block hashes.
        eos_token_ids: The model's end-of-text tokens.
        vocab_size: Token ids are below.
        prefix_caching: Whether blocks are found again by later requests.
        clock: Measures deadlines and queueing.
        step_time: Predicts steps, and learns from them; None begins with one that knows nothing.
        num_host_slots: Blocks in the host tier of every worker; 0 is no host tier.
        block_nbytes: Of one worker's part of a block, the largest; only with a host tier.
        mover: Of the store, only with a host tier; None is no store. The caller shuts it down.
        store_config: What is worth storing, and for how long to wait for it.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        executor: Executor,
        block_size: int,
        max_model_len: int,
        fingerprint: bytes,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        prefix_caching: bool,
        clock: Clock,
        step_time: StepTimeModel | None = None,
        num_host_slots: int = 0,
        block_nbytes: int = 0,
        mover: BlockMover | None = None,
        store_config: StoreConfig | None = None,
    ) -> None:
        self.step_time = step_time or StepTimeModel()
        self._config = config
        self._executor = executor
        self._clock = clock
        self._traits = ModelTraits(
            block_size, max_model_len, vocab_size, eos_token_ids, fingerprint
        )
        events = BlockEvents()
        uses = UseCounter(max(MIN_USES_REMEMBERED, 4 * (executor.num_blocks + num_host_slots)))
        self._host = HostTier(num_host_slots if prefix_caching else 0, events, uses)
        self._cache = PrefixCache(
            BlockPool(executor.num_blocks),
            is_enabled=prefix_caching,
            host=self._host if self._host.num_slots else None,
            events=events,
        )
        self._scheduler = Scheduler(
            config,
            self._cache,
            block_size=block_size,
            max_in_flight=executor.max_in_flight,
            step_time=self.step_time,
        )
        self._tiers: Tiers | None = None
        if self._host.num_slots:
            self._tiers = self._make_tiers(mover, store_config or StoreConfig(), block_nbytes)
        self._scheduler.tiers = self._tiers
        self._sequences: dict[str, Sequence] = {}  # by request_id, until the end is decided
        self._steps: deque[_StepInFlight] = deque()  # submitted, oldest first
        self._leaving: dict[str, _Leaving] = {}  # by request_id: handed over when they are stored
        self._ended: list[EngineOutput] = []  # last outputs that no step's result brings
        self._next_expiry_s = math.inf  # no deadline passes before
        self._seq_ids = count()
        self._step_ids = count()
        self._num_generated_tokens = 0
        self._failure = ""

    def _make_tiers(
        self, mover: BlockMover | None, config: StoreConfig, block_nbytes: int
    ) -> Tiers:
        sizes = {
            "block_size": self._traits.block_size,
            "block_nbytes": block_nbytes,
            "step_tokens": self._config.max_num_batched_tokens,
        }
        store = None
        if mover is not None:
            store = StoreTier(mover, self._host, config, self._clock, **sizes)
        return Tiers(self._cache, self._host, store, config, **sizes)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute, to copy, to collect or to return."""
        if self._sequences or self._steps or self._ended:
            return True
        return self._tiers is not None and self._tiers.has_copies

    def add(self, request: EngineRequest) -> None:
        """Queue a request; its outputs come from `step`, the last one says how it ended.

        Raises:
            InvalidArgumentError: It could never be served; `field` says why.
            OverloadedError: The queue is full.
            UnavailableError: The group failed.
        """
        if self._failure:
            raise UnavailableError(f"this replica group has failed: {self._failure}")
        if request.request_id in self._sequences:
            raise InvalidArgumentError(
                f"request_id={request.request_id!r} is being served: choose another",
                field="request_id",
            )
        check_request(request, self._traits, self._cache.num_blocks)
        self._scheduler.check_has_room()
        sequence = Sequence(next(self._seq_ids), request, self._traits, self._clock.now())
        if request.output_token_ids and (reason := sequence.finish_reason()) is not None:
            # It had ended where it came from: only the word of that was lost.
            self._ended.append(EngineOutput(request.request_id, finish_reason=reason))
            return
        self._next_expiry_s = min(self._next_expiry_s, sequence.expires_s)
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)
        if self._tiers is not None:
            self._tiers.begin(sequence, self.step_time.cost)

    def abort(self, request_id: str) -> None:
        """End a request; the next `step` returns its last output. An unknown one is fine.

        Its blocks are free at once or, where its step is in flight, when that is collected.
        """
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._ended.append(self._end(sequence, reason=FinishReason.CANCELLED))

    def hand_over(self, request_id: str) -> None:
        """End a request with `FinishReason.MOVED`, so that another replica goes on with it.

        Where its blocks are faster read from the store than computed, they are written first, and
        it goes on here until they are. An unknown one is fine.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or request_id in self._leaving:
            return
        hashes: list[bytes] = []
        if self._tiers is not None and sequence.state is SequenceState.RUNNING:
            hashes = self._tiers.store_all(sequence, self.step_time.cost)
        self._leaving[request_id] = _Leaving(self._clock.now() + HAND_OVER_S, hashes)

    def step(self) -> list[EngineOutput]:
        """Submit what can be submitted, wait for the oldest step, return what is new.

        At most one output per request; none if there is no work.

        Raises:
            UnavailableError: The executor failed: call `abort_all`.
        """
        self._end_expired()
        self._move_blocks(0.0)
        self._end_leaving()
        while len(self._steps) < self._executor.max_in_flight and self._submit():
            pass
        outputs = []
        if self._steps:
            outputs = self._collect()
            self._move_blocks(0.0)
        elif self._sequences:
            wait_s = self._scheduler.waits_until_s() - self._clock.now()
            assert wait_s < math.inf, "requests wait, but no step is possible"
            self._move_blocks(min(MOVES_WAIT_S, max(0.0, wait_s)))
        ended, self._ended = self._ended, []
        return ended + outputs

    def abort_all(self, error: str) -> list[EngineOutput]:
        """End every request, because the group failed; the engine takes no further ones.

        Args:
            error: "CODE: message", for each of them.
        """
        self._failure = error
        for step in self._steps:
            for chunk in step.batch.chunks:
                self._scheduler.abandon(chunk)
            self._cache.moves_ended(step.held)
        self._steps.clear()
        for sequence in list(self._sequences.values()):
            self._ended.append(self._end(sequence, error=error))
        ended, self._ended = self._ended, []
        return ended

    def load(self) -> ReplicaLoad:
        """Return how busy the engine is; takes time in proportion to the requests it has."""
        running, waiting = self._scheduler.running.values(), self._scheduler.waiting.values()
        num_to_prefill = sum(
            max(1, s.num_remaining_tokens - s.num_expected_tokens) for s in waiting
        )
        num_to_prefill += sum(s.num_remaining_tokens for s in running if not s.is_decoding)
        pace = self._scheduler.prefill_time.now()
        due, late_s = self._scheduler.work(self._clock.now(), pace)
        return ReplicaLoad(
            num_running=len(running),
            num_waiting=len(waiting),
            num_queued_prefill_tokens=num_to_prefill,
            num_free_blocks=self._cache.num_free_blocks,
            num_blocks=self._cache.num_blocks,
            num_prefix_query_tokens=self._scheduler.num_prefix_query_tokens,
            num_prefix_hit_tokens=self._scheduler.num_prefix_hit_tokens,
            num_generated_tokens=self._num_generated_tokens,
            step_cost=self.step_time.cost,
            cache=self._tiers.load() if self._tiers is not None else CacheLoad(),
            due=due,
            late_s=late_s,
            prefill_token_s=pace.token_s,
            fetch_block_s=0.0 if self._store is None else self._store.fetch_block_s,
            decode_step_s=pace.decode_step_s,
        )

    @property
    def num_preemptions(self) -> int:
        """Sequences that had to give up their blocks, since start."""
        return self._scheduler.num_preemptions

    @property
    def num_preloading(self) -> int:
        """Blocks of `preload` that are on their way."""
        store = self._store
        return store.num_preloading if store is not None else 0

    @property
    def num_preloaded(self) -> int:
        """Blocks of `preload` that have come."""
        store = self._store
        return store.num_preloaded if store is not None else 0

    @property
    def _store(self) -> StoreTier | None:
        return self._tiers.store if self._tiers is not None else None

    def preload(self, hashes: Iterable[bytes]) -> None:
        """Begin to fetch blocks from the store into the host tier, as many as find a place."""
        if self._store is not None:
            self._store.preload(list(hashes))

    def flush_cache(self) -> int:
        """Forget every cached block that no request uses, in KV cache and host tier.

        Returns:
            How many there were; one in both counts twice.
        """
        return self._tiers.flush() if self._tiers is not None else self._cache.flush()

    def take_block_events(self) -> tuple[list[bytes], list[bytes]]:
        """Return the hashes of blocks added to and removed from the cache since the last call."""
        return self._cache.take_events()

    def cached_blocks(self) -> list[bytes]:
        """Return the hashes of all cached blocks, those of events not taken yet included."""
        return self._cache.hashes()

    def check_invariants(self) -> None:
        """Assert that queues, blocks and steps in flight agree."""
        live = {s.seq_id: s for s in self._sequences.values()}
        in_flight = {c.sequence.seq_id: c.sequence for s in self._steps for c in s.batch.chunks}
        assert len(in_flight) == sum(len(s.batch.chunks) for s in self._steps), "in flight twice"
        assert live == {**self._scheduler.running, **self._scheduler.waiting}
        for sequence in {**live, **in_flight}.values():
            assert sequence.in_flight == (sequence.seq_id in in_flight)
            assert (sequence.state is SequenceState.FINISHED) == (sequence.seq_id not in live)
        self._scheduler.check_invariants()
        if self._store is not None:
            self._store.check_invariants()
        self._cache.check_invariants(s.block_table for s in {**live, **in_flight}.values())

    def _submit(self) -> bool:
        batch = self._scheduler.schedule(self._clock.now())
        moves, held = self._cache.take_moves()
        if not batch.chunks and not moves:
            return False
        step = _StepInFlight(next(self._step_ids), batch, moves, held)
        self._steps.append(step)
        plans = tuple([chunk.sequence.plan(chunk.num_tokens) for chunk in batch.chunks])
        self._executor.submit(StepPlan(step.step_id, plans, moves))
        return True

    def _move_blocks(self, timeout_s: float) -> None:
        if self._tiers is not None:
            self._tiers.work(timeout_s, self.step_time.cost)

    def _collect(self) -> list[EngineOutput]:
        result = self._executor.collect(self._config.step_timeout_s)
        step = self._steps.popleft()
        assert result.step_id == step.step_id, f"step {result.step_id} came for {step.step_id}"
        self._cache.moves_ended(step.held)
        self._observe(step, result.elapsed_s)
        now_s = self._clock.now()
        outputs = (self._apply(chunk, result, now_s) for chunk in step.batch.chunks)
        return [output for output in outputs if output is not None]

    def _observe(self, step: _StepInFlight, elapsed_s: float) -> None:
        """Learn from a step's time, as far as it is that of its tokens."""
        if self._tiers is not None:
            num_copies = len(step.moves.offloads) + len(step.moves.restores)
            copied_s = self._tiers.copy_seconds(num_copies)
            if copied_s > elapsed_s / 4:
                return
            elapsed_s -= copied_s
        if step.batch.chunks:
            self.step_time.observe(step.batch.shape, elapsed_s)

    def _apply(self, chunk: Chunk, result: StepResult, now_s: float) -> EngineOutput | None:
        """Advance a sequence by a computed chunk; return its new token, if it got one."""
        sequence = chunk.sequence
        self._scheduler.complete(chunk)
        if sequence.state is SequenceState.FINISHED or sequence.num_remaining_tokens:
            return None
        token = result.tokens[sequence.seq_id]
        self._num_generated_tokens += 1
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        reason = sequence.append(token.token_id)
        if reason is not None:
            return self._end(sequence, (token,), reason=reason)
        return EngineOutput(sequence.request.request_id, (token,), sequence.num_cached_tokens)

    def _end_expired(self) -> None:
        now_s = self._clock.now()
        if now_s < self._next_expiry_s:
            return
        for sequence in list(self._sequences.values()):
            if sequence.expires_s <= now_s:
                request = sequence.request
                error = (
                    f"DEADLINE_EXCEEDED: deadline_s={request.deadline_s:g} passed after "
                    f"{sequence.num_output_tokens} of max_tokens={request.sampling.max_tokens}: "
                    "allow more time or ask for fewer tokens"
                )
                self._ended.append(self._end(sequence, error=error))
        self._next_expiry_s = min(
            (sequence.expires_s for sequence in self._sequences.values()), default=math.inf
        )

    def _end_leaving(self) -> None:
        """End those that are handed over and whose blocks are stored, or late."""
        now_s = self._clock.now()
        for request_id, leaving in list(self._leaving.items()):
            is_stored = self._tiers is None or self._tiers.is_stored(leaving.hashes)
            if is_stored or now_s >= leaving.until_s:
                sequence = self._sequences[request_id]
                self._ended.append(self._end(sequence, reason=FinishReason.MOVED))

    def _end(
        self,
        sequence: Sequence,
        tokens: tuple[SampledToken, ...] = (),
        *,
        reason: FinishReason | None = None,
        error: str | None = None,
    ) -> EngineOutput:
        """Take a sequence out of the engine; return its last output."""
        del self._sequences[sequence.request.request_id]
        self._leaving.pop(sequence.request.request_id, None)
        self._scheduler.end(sequence)
        began_s = self._clock.now() if sequence.admitted_s is None else sequence.admitted_s
        return EngineOutput(
            sequence.request.request_id,
            tokens,
            sequence.num_cached_tokens,
            reason,
            error,
            began_s - sequence.arrived_s,
        )
