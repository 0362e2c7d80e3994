"""Fakes that more than one room's tests use."""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.clock import VirtualClock
from cluster.engine.mover import Move, MoveKind, MoveResult
from cluster.errors import UnavailableError
from cluster.step import BlockMoves, SequenceStep, StepPlan, StepResult
from cluster.types import EngineRequest, FinishReason, SampledToken, StepShape

BLOCK_NBYTES = 2**20  # of a worker's part of a block, where nothing has bytes
Choose = Callable[[Sequence[int]], int]


def checksum_choice(vocab_size: int) -> Choose:
    """Return a model whose next token depends on every token before it."""
    return lambda tokens: zlib.crc32(array("q", tokens).tobytes()) % vocab_size


def expected_answer(
    request: EngineRequest,
    *,
    choose: Choose,
    vocab_size: int,
    max_model_len: int,
    eos_token_ids: frozenset[int],
) -> tuple[list[int], FinishReason]:
    """Return what a request has to get: one sequence alone, no batches, no blocks, no cache."""
    sampling = request.sampling
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else eos_token_ids)
    tokens, output = list(request.prompt_token_ids), []
    while True:
        banned = stops if len(output) < sampling.min_tokens else set()
        token = _first_allowed(choose(tokens), banned, vocab_size)
        tokens.append(token)
        output.append(token)
        if token in stops:
            return output, FinishReason.STOP
        if len(output) == sampling.max_tokens or len(tokens) == max_model_len:
            return output, FinishReason.LENGTH


def _first_allowed(token: int, banned: set[int], vocab_size: int) -> int:
    while token in banned:
        token = (token + 1) % vocab_size
    return token


@dataclass(frozen=True)
class _Slot:
    """What a place in the shadow KV cache holds: like real keys, it depends on all before it."""

    prefix: int  # checksum of the tokens before
    token: int

    @property
    def checksum(self) -> int:
        return zlib.crc32(array("q", (self.prefix, self.token)).tobytes())


Content = tuple[_Slot, ...]


class FakeExecutor:
    """An executor without a model that checks every plan against a shadow KV cache.

    The next token is chosen from the tokens that the block table leads to, so that a wrong block
    changes the output even where no assertion notices it.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 1000,
        max_in_flight: int = 1,
        choose: Choose | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.max_in_flight = max_in_flight
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.choose = choose or checksum_choice(vocab_size)
        self.plans: list[StepPlan] = []  # all that were submitted
        self.token_s = 0.0  # what a step says that a token took; 0 is not measured
        self.submit_fails = False
        self.collect_fails = False
        self.while_computing: Callable[[], None] = lambda: None  # called by every step
        self.is_shut_down = False
        self.host: dict[int, Content] = {}  # what the slots of the host tier hold
        self._cache: dict[tuple[int, int], _Slot] = {}
        self._tokens: dict[int, list[int]] = {}  # seq_id -> all that is known of it
        self._in_flight: deque[tuple[StepPlan, StepResult]] = deque()

    def submit(self, plan: StepPlan) -> None:
        assert not self.is_shut_down
        if self.submit_fails:
            raise UnavailableError("worker 0 died")
        self._check_step(plan)
        self._copy(plan.moves)
        self.plans.append(plan)
        tokens = {s.seq_id: t for s in plan.sequences if (t := self._compute(s)) is not None}
        elapsed_s = self.token_s * plan.num_tokens
        self._in_flight.append((plan, StepResult(plan.step_id, tokens, elapsed_s)))

    def collect(self, timeout_s: float) -> StepResult:
        assert not self.is_shut_down and timeout_s > 0
        if self.collect_fails:
            raise UnavailableError("worker 0 died")
        plan, result = self._in_flight.popleft()
        self.while_computing()
        for step in plan.sequences:
            if step.sample is not None:
                self._tokens[step.seq_id].append(result.tokens[step.seq_id].token_id)
        return result

    def shutdown(self) -> None:
        self.is_shut_down = True

    def _check_step(self, plan: StepPlan) -> None:
        assert len(self._in_flight) < self.max_in_flight, "more steps than stages"
        assert plan.sequences or plan.moves, "an empty step"
        in_flight = [step for other, _ in self._in_flight for step in other.sequences]
        seq_ids = [step.seq_id for step in (*in_flight, *plan.sequences)]
        assert len(seq_ids) == len(set(seq_ids)), f"in flight twice: {seq_ids}"
        written = [block for step in (*in_flight, *plan.sequences) for block in self._written(step)]
        assert len(written) == len(set(written)), "two sequences write to one block"
        for step in in_flight:
            mine = {block for other in plan.sequences for block in self._written(other)}
            assert not mine & set(step.block_table), "a block of a step in flight is written"

    def _copy(self, moves: BlockMoves) -> None:
        """Copy between the shadow cache and the shadow host tier, as a worker does."""
        targets = [block for _, block in moves.restores]
        assert len(set(targets)) == len(targets), "two slots are restored to one block"
        slots = [slot for _, slot in moves.offloads]
        assert len(set(slots)) == len(slots), "two blocks are offloaded to one slot"
        for block, slot in moves.offloads:
            assert not self.is_busy(slot), "a slot is overwritten under a move"
            places = [(block, offset) for offset in range(self.block_size)]
            assert all(place in self._cache for place in places), "offloaded before it was full"
            self.host[slot] = tuple(self._cache[place] for place in places)
        for slot, block in moves.restores:
            in_flight = [step for plan, _ in self._in_flight for step in plan.sequences]
            assert all(block not in step.block_table for step in in_flight)
            for offset, value in enumerate(self.host[slot]):
                self._cache[block, offset] = value

    def is_busy(self, slot: int) -> bool:
        """Return whether a move reads or writes a slot; `FakeMover` replaces this."""
        return False

    def _written(self, step: SequenceStep) -> list[int]:
        first = step.num_computed_tokens // self.block_size
        last = (step.num_computed_tokens + len(step.token_ids) - 1) // self.block_size
        return list(step.block_table[first : last + 1])

    def _compute(self, step: SequenceStep) -> SampledToken | None:
        num_computed, num_now = step.num_computed_tokens, len(step.token_ids)
        num_after = num_computed + num_now
        assert num_now > 0
        assert len(step.block_table) * self.block_size >= num_after, "a token without a place"
        assert len(set(step.block_table)) == len(step.block_table)
        assert all(0 <= block < self.num_blocks for block in step.block_table)
        tokens = self._read(step, num_computed)
        self._write(step, tokens)
        tokens += step.token_ids
        known = self._tokens.setdefault(step.seq_id, [])
        assert tokens[: len(known)] == known[:num_after], "not the tokens of this sequence"
        known.extend(tokens[len(known) :])
        if step.sample is None:
            return None
        assert num_after == len(known) == step.sample.position, "sampled before its end"
        choice = self.choose(tokens)
        return SampledToken(
            _first_allowed(choice, set(step.sample.banned_token_ids), self.vocab_size)
        )

    def _read(self, step: SequenceStep, num_computed: int) -> list[int]:
        """Return the computed tokens; each must have been computed after the same prefix."""
        tokens, checksum = [], 0
        for position in range(num_computed):
            slot = self._cache.get(self._place(step, position))
            assert slot is not None, f"position {position} was never computed"
            assert slot.prefix == checksum, f"position {position} belongs to another prefix"
            tokens.append(slot.token)
            checksum = slot.checksum
        return tokens

    def _write(self, step: SequenceStep, computed: list[int]) -> None:
        checksum = 0
        if computed:
            checksum = self._cache[self._place(step, len(computed) - 1)].checksum
        for position, token in enumerate(step.token_ids, start=len(computed)):
            slot = _Slot(checksum, token)
            self._cache[self._place(step, position)] = slot
            checksum = slot.checksum

    def _place(self, step: SequenceStep, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.block_size)
        return step.block_table[block], offset


class FakeMover:
    """Moves between an executor's shadow host tier and a store that engines may share.

    Bytes are taken and given when a move ends, the worst moment for a slot that is not held.

    Args:
        executor: Whose slots they are.
        store: By hash; the fake keeps nothing else.
        clock: Tells how long a move took, and passes while somebody waits.
    """

    def __init__(
        self, executor: FakeExecutor, store: dict[bytes, Content], clock: VirtualClock
    ) -> None:
        self.store = store
        self.pinned: set[bytes] = set()
        self.moves: list[Move] = []  # all that were submitted
        self.error = ""  # of every move that ends now
        self.write_error = ""  # of every write that ends now
        self.is_silent = False  # no move ends
        self.move_s = 0.001  # that a move takes
        self._executor, self._clock = executor, clock
        self._open: deque[tuple[float, Move]] = deque()
        executor.is_busy = self._is_busy  # type: ignore[method-assign]

    def submit(self, move: Move) -> None:
        slots = [slot for _, other in self._open for slot in other.slots]
        assert not set(slots) & set(move.slots), "a slot takes part in two moves"
        assert len(set(move.slots)) == len(move.slots)
        self.moves.append(move)
        self._open.append((self._clock.now(), move))

    def collect(self, timeout_s: float) -> list[MoveResult]:
        if not self._due() and timeout_s > 0:
            self._clock.advance(timeout_s if self.is_silent else min(timeout_s, self.move_s))
        results = []
        while self._due():
            _, move = self._open.popleft()
            results.append(self._end(move, self.move_s))  # not until somebody looks
        return results

    def shutdown(self) -> None:
        self._open.clear()

    @property
    def is_at_work(self) -> bool:
        return bool(self._open)

    def _due(self) -> bool:
        if self.is_silent or not self._open:
            return False
        return self._clock.now() - self._open[0][0] >= self.move_s

    def _is_busy(self, slot: int) -> bool:
        return any(slot in move.slots for _, move in self._open)

    def _end(self, move: Move, elapsed_s: float) -> MoveResult:
        error = self.error or (self.write_error if move.kind is MoveKind.PUT else "")
        if error:
            nothing = (False,) * len(move.hashes)
            return MoveResult(move.move_id, nothing, elapsed_s, error=error)
        if move.kind is MoveKind.PUT:
            for block_hash, slot in zip(move.hashes, move.slots, strict=True):
                self.store[block_hash] = self._executor.host[slot]
                if move.is_pinned:
                    self.pinned.add(block_hash)
        found = tuple(block_hash in self.store for block_hash in move.hashes)
        if move.kind is MoveKind.GET:
            for block_hash, slot in zip(move.hashes, move.slots, strict=True):
                if block_hash in self.store:
                    self._executor.host[slot] = self.store[block_hash]
        num_bytes = 0 if move.kind is MoveKind.FIND else sum(found) * BLOCK_NBYTES
        return MoveResult(move.move_id, found, elapsed_s, num_bytes)


def shape_of(plan: StepPlan) -> StepShape:
    """Return what the time of a step depends on, read from its plan alone."""
    shape = StepShape()
    for step in plan.sequences:
        if len(step.token_ids) == 1 and step.sample is not None:
            shape = shape.with_decode(step.num_computed_tokens)
        else:
            shape = shape.with_chunk(len(step.token_ids), step.num_computed_tokens)
    return shape


class TimedExecutor:
    """An executor without a model whose steps take the time that `seconds` says.

    Args:
        clock: Goes on by that time with each step.
        seconds: Of a step of this shape.
        num_blocks: Of a KV cache that is not there.
    """

    max_in_flight = 1

    def __init__(
        self, clock: VirtualClock, seconds: Callable[[StepShape], float], num_blocks: int = 4096
    ) -> None:
        self._clock, self._seconds = clock, seconds
        self.num_blocks = num_blocks
        self.shapes: list[StepShape] = []  # of all steps
        self.elapsed_s: list[float] = []  # likewise
        self._plans: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def collect(self, timeout_s: float) -> StepResult:
        plan = self._plans.popleft()
        shape = shape_of(plan)
        elapsed_s = self._seconds(shape)
        self._clock.advance(elapsed_s)
        self.shapes.append(shape)
        self.elapsed_s.append(elapsed_s)
        tokens = {s.seq_id: SampledToken(1) for s in plan.sequences if s.sample is not None}
        return StepResult(plan.step_id, tokens, elapsed_s)

    def shutdown(self) -> None:
        self._plans.clear()
