"""Engines with tiers in this process, one after the other on one model: replicas of a benchmark.

    SharedModel   weights, KV cache, host memory, mover     loaded once
       └── Replica   an engine that knows no block          one at a time; closed before the next

What a new engine does not know is not there: it begins with an empty KV cache and host tier, and
only the store has what others have written, as for another replica on another machine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.bench.engine_drive import Emit, Pace, drive
from cluster.bench.engine_setup import num_threads_of
from cluster.bench.statistics import RequestRecord
from cluster.clock import WallClock
from cluster.config import ClusterConfig
from cluster.engine.engine import Engine
from cluster.engine.executor import Executor
from cluster.engine.mover import BlockMover, Move, MoveResult
from cluster.engine.step_time import StepTimeModel
from cluster.errors import SluiceError, UnavailableError
from cluster.model.model_info import ModelInfo
from cluster.replica.build import Tiers, load_whole, make_engine, max_model_len_of, part_nbytes
from cluster.replica.executor import InProcessExecutor
from cluster.replica.local_tiers import LocalTiers
from cluster.step import StepPlan, StepResult
from cluster.types import CacheLoad, EngineRequest

DRAIN_TIMEOUT_S = 30.0
_POLL_S = 0.001


@dataclass(frozen=True, slots=True)
class StoreStep:
    """One step, and what went on beside it."""

    num_sequences: int
    num_tokens: int  # computed
    num_copies: int  # blocks between KV cache and host tier, a part of the step
    is_moving: bool  # blocks were on their way from or to the store
    wall_s: float  # scheduling, computing, handing out

    @property
    def is_decode(self) -> bool:
        """Whether every sequence computed one token."""
        return 0 < self.num_tokens == self.num_sequences


class WatchedMover:
    """A mover that keeps books of what goes through it.

    Args:
        mover: Moves the blocks; the caller's to shut down.
    """

    def __init__(self, mover: BlockMover) -> None:
        self._mover = mover
        self.num_open = 0
        self.results: list[MoveResult] = []  # of the present measurement: the caller clears it

    def submit(self, move: Move) -> None:
        """Begin a move."""
        self.num_open += 1
        self._mover.submit(move)

    def collect(self, timeout_s: float) -> list[MoveResult]:
        """Return the results that are there."""
        results = self._mover.collect(timeout_s)
        self.num_open -= len(results)
        self.results += results
        return results

    def shutdown(self) -> None:
        """End the mover."""
        self._mover.shutdown()


class _WatchedExecutor:
    """An executor of which an engine may use so many blocks, and that remembers its last plan."""

    def __init__(self, executor: Executor, num_blocks: int) -> None:
        self._executor = executor
        self._plans: deque[StepPlan] = deque()
        self.max_in_flight, self.num_blocks = executor.max_in_flight, num_blocks
        self.last: StepPlan | None = None

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)
        self._executor.submit(plan)

    def collect(self, timeout_s: float) -> StepResult:
        result = self._executor.collect(timeout_s)
        self.last = self._plans.popleft()
        return result

    def shutdown(self) -> None:
        self._executor.shutdown()


class Replica:
    """An engine as a `Server` of `engine_drive`; keeps a record of every step.

    Args:
        engine: Whose executor is `executor`.
        executor: Around the one that computes.
        mover: To the store; None where the engine has none.
    """

    def __init__(
        self, engine: Engine, executor: _WatchedExecutor, mover: WatchedMover | None
    ) -> None:
        self.engine = engine
        self.steps: list[StoreStep] = []  # of the present measurement: the caller clears it
        self.outputs: dict[str, list[int]] = {}  # tokens by request, likewise
        self._executor = executor
        self._mover = mover

    @property
    def cache(self) -> CacheLoad:
        """State and counters of the tiers."""
        return self.engine.load().cache

    def add(self, request: EngineRequest) -> None:
        """Queue a request."""
        self.engine.add(request)

    def step(self, emit: Emit) -> None:
        """Compute one step."""
        if not self.engine.has_work:
            raise UnavailableError("the engine has no work, but requests are open")
        was_moving = self._is_moving
        start_s = time.perf_counter()
        outputs = self.engine.step()
        wall_s = time.perf_counter() - start_s
        plan, self._executor.last = self._executor.last, None
        if plan is not None:
            num_copies = len(plan.moves.offloads) + len(plan.moves.restores)
            is_moving = was_moving or self._is_moving or bool(num_copies)
            step = StoreStep(len(plan.sequences), plan.num_tokens, num_copies, is_moving, wall_s)
            self.steps.append(step)
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).extend(
                token.token_id for token in output.tokens
            )
            emit(output)

    def run(
        self,
        requests: Sequence[EngineRequest],
        *,
        max_at_once: int | None = None,
        on_record: Callable[[RequestRecord], None] = lambda _: None,
    ) -> list[RequestRecord]:
        """Return the records of requests that are given at once.

        Args:
            requests: Any.
            max_at_once: Of them, in the engine; None is all.
            on_record: Called as each ends.

        Raises:
            SluiceError: One of them failed.
        """
        pace = Pace(len(requests), max_at_once or len(requests))
        records = drive(self, requests, pace, WallClock(), on_record)
        bad = next((record for record in records if not record.is_ok), None)
        if bad is not None:
            raise SluiceError(f"a request of the benchmark ended with {bad.status}")
        return records

    def settle(self, is_settled: Callable[[], bool] = lambda: True) -> None:
        """Let moves and copies end that are under way, and wait until something holds.

        Args:
            is_settled: What has to hold.

        Raises:
            UnavailableError: It does not within `DRAIN_TIMEOUT_S`.
        """
        deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
        while self.engine.has_work or self._is_moving or not is_settled():
            if time.monotonic() > deadline_s:
                raise UnavailableError(
                    f"the tiers were not done within {DRAIN_TIMEOUT_S:g} s: {self.cache}"
                )
            self.engine.step()
            time.sleep(_POLL_S)
        self._executor.last = None

    @property
    def _is_moving(self) -> bool:
        return self._mover is not None and self._mover.num_open > 0


class SharedModel:
    """One model in this process and what its replicas use in turn.

    Args:
        config: Of the cluster, tp = pp = 1, the store's URL that of a Redis.
        info: Of the checkpoint.
        num_blocks: Of the KV cache, the most that a replica uses.
        num_slots: Of the host tier, likewise.

    Raises:
        ConfigError: The model or its memory do not fit.
    """

    def __init__(
        self, config: ClusterConfig, info: ModelInfo, *, num_blocks: int, num_slots: int
    ) -> None:
        self.info = info
        self.block_nbytes = part_nbytes(config, info, 0)
        cache = {"num_blocks": num_blocks, "host_memory_bytes": num_slots * self.block_nbytes}
        self.config = config.model_copy(update={"cache": config.cache.model_copy(update=cache)})
        self.num_blocks = num_blocks
        self._tiers = LocalTiers(self.config, info)
        runner = load_whole(
            self.config,
            num_blocks=num_blocks,
            max_model_len=max_model_len_of(self.config, info),
            num_threads=num_threads_of(self.config),
            slots=self._tiers.slots,
        )
        self._executor = InProcessExecutor(runner)
        self._step_time = StepTimeModel()  # it knows the machine, not who computes
        self._open: Replica | None = None
        mover = self._tiers.tiers.mover
        self.mover = None if mover is None else WatchedMover(mover)

    @property
    def mover_pid(self) -> int | None:
        """Of the mover's process."""
        return self._tiers.mover_pid

    def replica(
        self,
        *,
        num_blocks: int | None = None,
        num_slots: int | None = None,
        has_tiers: bool = True,
        caches: bool = True,
    ) -> Replica:
        """Return a replica that knows no block; the one before it is closed.

        Args:
            num_blocks: Of its KV cache; None is all.
            num_slots: Of its host tier; None is all.
            has_tiers: Whether there is something below the KV cache.
            caches: Whether it finds any block again.
        """
        self.close_replica()
        slots = self._tiers.tiers.num_slots if num_slots is None else num_slots
        tiers = Tiers(slots, self.block_nbytes, self.mover) if has_tiers and caches else None
        executor = _WatchedExecutor(self._executor, num_blocks or self.num_blocks)
        cache = self.config.cache.model_copy(update={"prefix_caching": caches})
        config = self.config.model_copy(update={"cache": cache})
        engine = make_engine(config, self.info, executor, WallClock(), self._step_time, tiers)
        self._open = Replica(engine, executor, self.mover if tiers is not None else None)
        return self._open

    def close_replica(self) -> None:
        """Wait for what the last replica has under way; another one can use the memory then."""
        if self._open is not None:
            self._open.settle()
            self._open = None
        if self.mover is not None:
            self.mover.results.clear()

    def close(self) -> None:
        """End the mover and let go of the memory."""
        self._tiers.close()
