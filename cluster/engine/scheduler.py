"""Continuous batching: which sequences compute how many tokens in the next step.

A step takes, until its budget of tokens or of time (pace.py) or its number of sequences is used up,

    1. the next token of every sequence that is decoding,
    2. chunks of prompts, begun or waiting, the most urgent ones first (prompt_order.py).

A waiting sequence that is begun gets the blocks of all its tokens so far. When blocks run out for a
token, batch work, then the sequence that was begun last gives up all of its own and waits again;
what it generated becomes part of the prompt that it computes again. A prompt that can still be in
time takes blocks and places of batch work, and of prompts that cannot.

    running  | 3 | 7 | 4 | 6 |   in the order in which they were begun: 3 always gets what it needs

So the first one always ends, and nothing starves. Nor do chunks and decodes starve each other:
decodes go first, and a sequence joins them only with a token of the budget that they left over, so
that they never outgrow it.

Blocks of a prompt that a tier below the KV cache has are not computed. A sequence whose blocks are
on their way from the store computes those before them, then waits, for a time: it holds blocks and
a place, and takes part in no step.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.config import EngineConfig
from cluster.engine.pace import step_limit_s
from cluster.engine.prefill_time import PrefillPace, PrefillTime
from cluster.engine.prefix_cache import PrefixCache
from cluster.engine.prompt_order import PromptOrder
from cluster.engine.sequence import Sequence, SequenceState
from cluster.engine.step_time import StepTimeModel, max_prompt_tokens
from cluster.engine.tiers import Tiers
from cluster.errors import OverloadedError
from cluster.types import DueWork, ServiceClass, StepShape

MAX_BATCH_PREEMPTIONS = 3
"""After so many a sequence of the batch class makes room for nobody any more: it has to end too."""


class Chunk(NamedTuple):
    """The part of a step that belongs to one sequence."""

    sequence: Sequence
    num_tokens: int  # to compute


@dataclass(slots=True)
class Batch:
    """A step that is being put together, then the step."""

    budget_tokens: int  # left
    num_places: int  # left
    limit_s: float = math.inf  # that it may take
    num_prompt_tokens: int = 0  # of the chunks of prompts
    chunks: list[Chunk] = field(default_factory=list)
    num_tokens: int = 0  # of all chunks
    context_tokens: int = 0  # that the decodes among them read
    prompt_work: float = 0.0  # tokens x context of the others

    @property
    def is_full(self) -> bool:
        """Whether nothing more goes in."""
        return self.budget_tokens <= 0 or self.num_places == 0

    @property
    def shape(self) -> StepShape:
        """What its time depends on."""
        return StepShape(self.num_tokens, len(self.chunks), self.context_tokens, self.prompt_work)

    def add_decode(self, sequence: Sequence) -> None:
        """Take the next token of a decoding sequence; it is in flight from now on."""
        self._add(sequence, 1)
        self.context_tokens += sequence.num_computed_tokens

    def add_prompt(self, sequence: Sequence, most: int) -> None:
        """Take up to `most` tokens of a prompt, within the budget; it is in flight from now on."""
        num_tokens = min(most, self.budget_tokens)
        self._add(sequence, num_tokens)
        self.num_prompt_tokens += num_tokens
        self.prompt_work += num_tokens * (sequence.num_computed_tokens + num_tokens / 2)

    def _add(self, sequence: Sequence, num_tokens: int) -> None:
        sequence.in_flight = True
        self.budget_tokens -= num_tokens
        self.num_places -= 1
        self.num_tokens += num_tokens
        self.chunks.append(Chunk(sequence, num_tokens))


class Scheduler:
    """Owns the queues and every sequence's blocks.

    Args:
        config: Limits of a step and of the queue.
        cache: The blocks.
        block_size: Tokens per block.
        max_in_flight: Steps that the executor works on at once; its pipeline stages.
        step_time: Predicts steps; the owner lets it learn.
    """

    def __init__(
        self,
        config: EngineConfig,
        cache: PrefixCache,
        *,
        block_size: int,
        max_in_flight: int,
        step_time: StepTimeModel,
    ) -> None:
        self._config = config
        self._step_time = step_time
        self._cache = cache
        self._block_size = block_size
        self._max_in_flight = max_in_flight
        self._max_num_running = config.max_num_seqs * max_in_flight
        self.tiers: Tiers | None = None  # below the cache
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.running: dict[int, Sequence] = {}  # in the order in which they were begun
        self._order = PromptOrder(config)
        self.prefill_time = PrefillTime(config, step_time, self.running)
        # Since start; a sequence that is admitted again after a preemption is not counted again.
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        self.num_preemptions = 0

    def check_has_room(self) -> None:
        """Refuse one more sequence if the queue is full.

        Raises:
            OverloadedError: As many wait as may wait.
        """
        if len(self.waiting) >= self._config.max_num_waiting:
            raise OverloadedError(
                f"{len(self.waiting)} requests wait in this replica, "
                f"limit={self._config.max_num_waiting}: come back later"
            )

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait, after all that came before it."""
        self.waiting[sequence.seq_id] = sequence
        sequence.num_expected_tokens = self._block_size * len(self._match(sequence))
        self._order.add(sequence)

    def schedule(self, now_s: float) -> Batch:
        """Return the next step, empty if there is nothing to do; it is in flight from now on."""
        batch = Batch(self._config.max_num_batched_tokens, self._config.max_num_seqs)
        self._make_room(now_s)
        decoding: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self.running.values():
            (decoding if sequence.is_decoding else prompts).append(sequence)
        decoding.sort(key=self._is_batch)  # who takes blocks goes before those who give them
        self._take_decodes(batch, decoding)
        if self.tiers is not None:  # not before: who decodes may have to wait for blocks
            decodes = (chunk.sequence for chunk in batch.chunks)
            self.tiers.begin_step(decodes, self._step_time.cost)
        if prompts:  # one of them may have been preempted for a decode
            prompts = [p for p in prompts if p.state is SequenceState.RUNNING and not p.in_flight]
        if prompts or self.waiting:
            self._limit_prompts(batch, decoding, prompts, now_s)
            if self.tiers is not None:
                self.tiers.limit_restores(self._slack_s(batch))
            self._take_prompts(batch, len(prompts), now_s)
        if self.tiers is not None:
            self.tiers.plan_copies(has_prompts=batch.num_prompt_tokens > 0)
        return batch

    def work(self, now_s: float, pace: PrefillPace) -> tuple[tuple[DueWork, ...], float]:
        """Return the prompts to be computed as `ReplicaLoad.due` and `late_s`."""
        return self._order.work(now_s, pace.seconds)

    def waits_until_s(self) -> float:
        """Return when the first of those that wait for the store goes on without it, at most."""
        return min((s.fetch.until_s for s in self.running.values() if s.fetch), default=math.inf)

    def complete(self, chunk: Chunk) -> None:
        """Note that a chunk is computed; if its sequence ended meanwhile, free its blocks."""
        sequence = chunk.sequence
        sequence.num_computed_tokens += chunk.num_tokens
        if not sequence.num_remaining_tokens:
            self._order.discard(sequence)
        self._register_full_blocks(sequence)
        self.abandon(chunk)

    def abandon(self, chunk: Chunk) -> None:
        """Note that a chunk is not in flight any more, whatever became of it."""
        chunk.sequence.in_flight = False
        if chunk.sequence.state is SequenceState.FINISHED:
            self._release_blocks(chunk.sequence)

    def end(self, sequence: Sequence) -> None:
        """Take a sequence out of the queues.

        Its blocks are free at once or, where a step that writes to them is in flight, with that
        step's `complete`.
        """
        self.waiting.pop(sequence.seq_id, None)
        self.running.pop(sequence.seq_id, None)
        sequence.state = SequenceState.FINISHED
        self._order.discard(sequence)
        self._give_up_fetch(sequence)
        if not sequence.in_flight:
            self._release_blocks(sequence)

    def check_invariants(self) -> None:
        """Assert that states, queues and blocks agree."""
        self._order.check_invariants()
        prompts = [s for s in self.running.values() if s.num_remaining_tokens and not s.is_decoding]
        for sequence in (*prompts, *self.waiting.values()):
            assert sequence in self._order, f"nobody computes the prompt of {sequence.seq_id}"
        num_decoding = sum(s in self._order for s in self.running.values() if s.is_decoding)
        assert len(self._order) == len(prompts) + len(self.waiting) + num_decoding
        assert len(self.running) <= self._max_num_running
        for sequence in self.waiting.values():
            assert sequence.state is SequenceState.WAITING and not sequence.in_flight
            assert not sequence.block_table and not sequence.num_computed_tokens
        for sequence in self.running.values():
            assert sequence.state is SequenceState.RUNNING
            assert 0 <= sequence.num_computed_tokens < sequence.num_tokens
            num_covered = len(sequence.block_table) * self._block_size
            assert num_covered >= sequence.num_tokens - sequence.is_decoding

    def _take_decodes(self, batch: Batch, decoding: list[Sequence]) -> None:
        # An equal share for each step in flight, or one stage would work on all and others on none.
        num_share = -(-len(decoding) // self._max_in_flight)
        for sequence in decoding:
            if batch.is_full or len(batch.chunks) == num_share:
                return
            # One that came earlier may have preempted it in this very loop.
            is_ready = sequence.state is SequenceState.RUNNING and not sequence.in_flight
            if is_ready and self._reserve_next_token(sequence):
                batch.add_decode(sequence)

    def _limit_prompts(
        self,
        batch: Batch,
        decoding: list[Sequence],
        prompts: list[Sequence],
        now_s: float,
    ) -> None:
        """Lower the budget so that the step is over when the next tokens are due.

        Those of all that decode: a sequence whose step is in flight waits behind this one too.
        """
        cost = self._step_time.cost
        if cost is None:
            return
        batch.limit_s = step_limit_s(
            (sequence for sequence in decoding if sequence.state is SequenceState.RUNNING),
            now_s,
            reserve=self._config.tpot_reserve,
            fastest_s=cost.seconds(batch.shape),
        )
        # The longest one is the slowest.
        self._fit_budget(batch, max((s.num_computed_tokens for s in prompts), default=0))

    def _fit_budget(self, batch: Batch, num_computed_tokens: int) -> None:
        """Lower the budget to what a prompt may take that has so many tokens in the cache."""
        cost = self._step_time.cost
        if cost is None or batch.limit_s == math.inf:
            return
        num_tokens = max_prompt_tokens(
            cost,
            batch.limit_s,
            batch.shape,
            num_computed_tokens=num_computed_tokens,
            most=batch.budget_tokens,
        )
        least = max(0, self._config.min_prefill_tokens - batch.num_prompt_tokens)
        batch.budget_tokens = max(min(least, batch.budget_tokens), num_tokens)

    def _slack_s(self, batch: Batch) -> float:
        """Return what the step's objective leaves beside the decodes that are in it."""
        cost = self._step_time.cost
        if cost is None or batch.limit_s == math.inf:
            return math.inf
        return batch.limit_s - cost.seconds(batch.shape)

    def _take_prompts(self, batch: Batch, num_begun: int, now_s: float) -> None:
        """Take chunks of prompts, the most urgent first; who waits is begun if there is room."""
        self._order.review(now_s, lambda: self.prefill_time.now().seconds)
        can_begin = True
        for sequence in self._order:
            if batch.is_full or not (num_begun or can_begin):
                return
            if sequence.state is SequenceState.RUNNING:
                if sequence.in_flight or sequence.is_decoding:
                    continue
                num_begun -= 1
            elif sequence.state is SequenceState.WAITING:
                # Others wait behind one that finds no room, or large ones would never find any.
                can_begin = can_begin and self._begin(sequence, now_s)
                if not can_begin:
                    continue
                if sequence.num_computed_tokens:  # what it has cached, its chunk looks at too
                    self._fit_budget(batch, sequence.num_computed_tokens)
                    if batch.is_full:
                        return
            self._take_prompt(batch, sequence, now_s)

    def _make_room(self, now_s: float) -> None:
        """Begin the most urgent waiting sequence while batch work can still yield to it.

        Once a decode has its place in the step, its blocks are not free before the step is over.
        """
        if not self.waiting or not any(self._yields(s) for s in self.running.values()):
            return
        self._order.review(now_s, lambda: self.prefill_time.now().seconds)
        first = next((s for s in self._order if s.state is SequenceState.WAITING), None)
        if first is not None and self._yielding(first) is not None:
            self._begin(first, now_s)

    def _begin(self, sequence: Sequence, now_s: float) -> bool:
        """Let a waiting sequence run if there is room for it, or others have to make room."""
        while not (len(self.running) < self._max_num_running and self._admit(sequence, now_s)):
            victim = self._yielding(sequence)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _yielding(self, sequence: Sequence) -> Sequence | None:
        """Return who gives up its blocks for a sequence that is to begin; None: nobody."""
        if sequence.request.service_class is ServiceClass.BATCH or self._order.is_late(sequence):
            return None
        yielding = [s for s in self.running.values() if self._yields(s)]
        num_free = self._cache.num_free_blocks + sum(len(s.block_table) for s in yielding)
        if not yielding or num_free * self._block_size < sequence.num_tokens:
            return None  # all of them would not be enough
        return yielding[-1]

    def _yields(self, sequence: Sequence) -> bool:
        if sequence.in_flight:
            return False
        if self._is_batch(sequence):
            return True
        is_late = self._order.is_late(sequence) and not sequence.num_output_tokens
        return is_late and sequence.num_preemptions < MAX_BATCH_PREEMPTIONS

    def _is_batch(self, sequence: Sequence) -> bool:
        is_batch = sequence.request.service_class is ServiceClass.BATCH
        is_batch = is_batch and self._config.order != "fcfs"
        return is_batch and sequence.num_preemptions < MAX_BATCH_PREEMPTIONS

    def _take_prompt(self, batch: Batch, sequence: Sequence, now_s: float) -> None:
        """Take the next chunk of a prompt, unless it waits for blocks of other tiers."""
        most = sequence.num_remaining_tokens
        if sequence.catches_up:
            num_computed_tokens = sequence.num_computed_tokens
            if not self._catch_up(sequence, now_s):
                if sequence.held_since_s is None:
                    sequence.held_since_s = now_s
                return
            most = sequence.num_remaining_tokens
            if sequence.num_computed_tokens > num_computed_tokens:
                self._fit_budget(batch, sequence.num_computed_tokens)
                if batch.is_full:
                    return
            if sequence.fetch is not None:  # what is on its way need not be computed
                ahead = sequence.fetch.start * self._block_size - sequence.num_computed_tokens
                most = min(most, ahead) if ahead > 0 else most
        num_tokens = batch.budget_tokens
        batch.add_prompt(sequence, most)
        self._order.charge(sequence, num_tokens - batch.budget_tokens)

    def _catch_up(self, sequence: Sequence, now_s: float) -> bool:
        """Take the blocks that come next from other tiers; return whether to compute now."""
        index, offset = divmod(sequence.num_computed_tokens, self._block_size)
        if offset:
            return True
        table = list(sequence.block_table)
        first = index
        while index < sequence.num_matchable_blocks:
            block = self._cache.fill(sequence.block_hash(index), table[index], index)
            if block is None:
                break
            table[index] = block
            index += 1
        if index > first:
            if sequence.is_first_run:
                self._note_hits(sequence, first, index, now_s)
            sequence.block_table = tuple(table)
            sequence.num_registered_blocks = index
            sequence.num_computed_tokens = index * self._block_size
        return self._goes_on(sequence, index, now_s)

    def _note_hits(self, sequence: Sequence, first: int, end: int, now_s: float) -> None:
        most = sequence.num_prompt_tokens  # blocks of an answer that goes on here count for nothing
        num_tokens = min(end * self._block_size, most) - min(first * self._block_size, most)
        sequence.num_cached_tokens += num_tokens
        self.num_prefix_hit_tokens += num_tokens
        assert self.tiers is not None, "only tiers let a sequence catch up"
        waited_s = 0.0 if sequence.held_since_s is None else now_s - sequence.held_since_s
        sequence.held_since_s = None
        self.tiers.note_hits(sequence, first, end, waited_s=waited_s, cost=self._step_time.cost)

    def _goes_on(self, sequence: Sequence, index: int, now_s: float) -> bool:
        """Return whether a sequence computes block `index`, which it could not fill."""
        is_missing = index < sequence.num_matchable_blocks
        if is_missing and self._cache.has(sequence.block_hash(index)):
            return False  # the next step copies it
        fetch = sequence.fetch
        if is_missing and fetch is not None:
            if index < fetch.start:
                return True
            if fetch.num_open and index < fetch.end:
                if now_s < fetch.until_s:
                    return False
                if self.tiers is not None:
                    self.tiers.note_late()
        sequence.catches_up = False
        self._give_up_fetch(sequence)
        return True

    def _give_up_fetch(self, sequence: Sequence) -> None:
        """Wait for nothing any more; what is on its way comes to the host tier all the same."""
        if sequence.fetch is not None:
            sequence.fetch.is_given_up = True
            sequence.fetch = None

    def _reserve_next_token(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block that its next token needs, or return False: wait.

        It may take blocks from batch work, and from those that were begun later, the last one
        first. Where that one is in flight it waits: to preempt another one instead would break the
        order.
        """
        if len(sequence.block_table) * self._block_size >= sequence.num_tokens:
            return True
        while self._cache.num_free_blocks == 0:
            victim = self._victim(sequence)
            if victim is sequence or victim.in_flight:
                return False
            self._preempt(victim)
        self._order.charge(sequence, self._block_size)
        sequence.block_table += tuple(self._cache.allocate(1))
        return True

    def _victim(self, sequence: Sequence) -> Sequence:
        """Return who gives up its blocks for a running one; itself: it has to wait."""
        if not self._is_batch(sequence):
            for other in reversed(self.running.values()):
                if self._is_batch(other) and not other.in_flight:
                    return other
        return next(reversed(self.running.values()))

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        self._order.discard(sequence)
        del self.running[sequence.seq_id]
        self.waiting[sequence.seq_id] = sequence
        self.waiting.move_to_end(sequence.seq_id, last=False)
        sequence.state = SequenceState.WAITING
        self._release_blocks(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_expected_tokens = self._block_size * len(self._match(sequence))
        sequence.is_first_run = False
        self._give_up_fetch(sequence)
        self._order.add(sequence)

    def _admit(self, sequence: Sequence, now_s: float) -> bool:
        """Let a waiting sequence run if all of its tokens so far find blocks.

        All, not those of the first chunk: a prompt that is begun is not given up halfway because
        two prompts took the blocks that were enough for one.
        """
        num_matchable = sequence.num_matchable_blocks
        matched = self._match(sequence)
        num_new_blocks = -(-sequence.num_tokens // self._block_size) - len(matched)
        if not self._cache.has_room(matched, num_new_blocks):
            return False
        self._cache.acquire(matched)
        sequence.block_table = (*matched, *self._cache.allocate(num_new_blocks))
        sequence.num_registered_blocks = len(matched)
        sequence.num_computed_tokens = len(matched) * self._block_size
        sequence.num_expected_tokens = sequence.num_computed_tokens
        if sequence.admitted_s is None:
            sequence.admitted_s = now_s
            sequence.num_cached_tokens = min(
                sequence.num_computed_tokens, sequence.num_prompt_tokens
            )
            self.num_prefix_query_tokens += sequence.num_prompt_tokens
            self.num_prefix_hit_tokens += sequence.num_cached_tokens
            if self.tiers is not None:
                self.tiers.note_prompt(sequence)
        sequence.catches_up = self.tiers is not None and len(matched) < num_matchable
        if not sequence.catches_up:
            self._give_up_fetch(sequence)
        sequence.state = SequenceState.RUNNING
        self.running[sequence.seq_id] = self.waiting.pop(sequence.seq_id)
        return True

    def _match(self, sequence: Sequence) -> list[int]:
        """Return the blocks of a sequence's tokens that are cached."""
        num_matchable = sequence.num_matchable_blocks
        return self._cache.match(sequence.block_hash(i) for i in range(num_matchable))

    def _register_full_blocks(self, sequence: Sequence) -> None:
        """Enter newly filled blocks into the prefix cache; an earlier copy replaces ours."""
        num_full = sequence.num_computed_tokens // self._block_size
        if not self._cache.is_enabled or num_full == sequence.num_registered_blocks:
            return
        table = list(sequence.block_table)
        for index in range(sequence.num_registered_blocks, num_full):
            table[index] = self._cache.register(sequence.block_hash(index), table[index], index)
            if self.tiers is not None:
                self.tiers.note_block(sequence, index)
        sequence.block_table = tuple(table)
        sequence.num_registered_blocks = num_full

    def _release_blocks(self, sequence: Sequence) -> None:
        self._cache.release(sequence.block_table)
        sequence.block_table = ()
        sequence.num_registered_blocks = 0
