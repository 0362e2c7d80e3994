"""Drives an engine without a network: users who ask, wait for the answer, and ask again.

    due ──► waits here ──► server.add ──► server.step ... ──► record ──► the user's next is due
            until `max_at_once` leaves a place

With as many users as requests that is a batch given at once. Time to the first token counts from
when a request is due, however long it waits and wherever.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.bench.statistics import RequestRecord
from cluster.clock import Clock
from cluster.engine.engine import Engine
from cluster.engine.executor import Executor
from cluster.errors import UnavailableError
from cluster.step import StepPlan, StepResult
from cluster.types import EngineOutput, EngineRequest, SamplingParams

Emit = Callable[[EngineOutput], None]
"""Takes an output at the moment when a caller could have it."""


class Server(Protocol):
    """Answers requests: the engine, or transformers' generate."""

    def add(self, request: EngineRequest) -> None:
        """Take a request."""
        ...

    def step(self, emit: Emit) -> None:
        """Work on the requests taken until there is something to emit."""
        ...


@dataclass(frozen=True, slots=True)
class Pace:
    """When requests are due and when the server gets them."""

    num_users: int  # requests due or under way at any time
    max_at_once: int  # of them, in the server
    waits_for_all: bool = False  # the server gets the next ones when all before them are answered
    budget_s: float = float("inf")  # no request begins later than this


def greedy_request(request_id: str, prompt: Sequence[int], num_tokens: int) -> EngineRequest:
    """Return a request for exactly `num_tokens` tokens, greedy, whatever the model says."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return EngineRequest(request_id, tuple(prompt), sampling)


def random_tokens(seed: str, num_tokens: int, vocab_size: int) -> list[int]:
    """Return token ids, uniform over the vocabulary, the same ones for the same seed."""
    return random.Random(seed).choices(range(vocab_size), k=num_tokens)


@dataclass(slots=True)
class _Open:
    """A request under way."""

    request: EngineRequest
    due_s: float
    times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0


def drive(
    server: Server,
    requests: Sequence[EngineRequest],
    pace: Pace,
    clock: Clock,
    on_record: Callable[[RequestRecord], None] = lambda _: None,
) -> list[RequestRecord]:
    """Return the records of all requests that began, in the order of their ends.

    Those that the budget's end finds waiting are dropped: they have no record. At least one begins.
    """
    return _Drive(server, requests, pace, clock, on_record).run()


class _Drive:
    def __init__(
        self,
        server: Server,
        requests: Sequence[EngineRequest],
        pace: Pace,
        clock: Clock,
        on_record: Callable[[RequestRecord], None],
    ) -> None:
        self._server = server
        self._pace = pace
        self._on_record = on_record
        self._clock = clock
        self._start_s = clock.now()
        self._later: Iterator[EngineRequest] = iter(requests)
        self._due: deque[tuple[float, EngineRequest]] = deque()
        self._open: dict[str, _Open] = {}
        self._records: list[RequestRecord] = []

    def run(self) -> list[RequestRecord]:
        for _ in range(self._pace.num_users):
            self._ask()
        self._begin()
        while self._open:
            self._server.step(self._take)
            self._begin()
        return self._records

    def _now_s(self) -> float:
        return self._clock.now() - self._start_s

    def _ask(self) -> None:
        request = next(self._later, None)
        if request is not None:
            self._due.append((self._now_s(), request))

    def _begin(self) -> None:
        """Give the server what it may have now."""
        if self._pace.waits_for_all and self._open:
            return
        is_first = not self._records and not self._open
        while self._due and len(self._open) < self._pace.max_at_once:
            if self._now_s() > self._pace.budget_s and not is_first:
                return
            is_first = False
            due_s, request = self._due.popleft()
            self._open[request.request_id] = _Open(request, due_s)
            self._server.add(request)

    def _take(self, output: EngineOutput) -> None:
        now_s = self._now_s()
        one = self._open[output.request_id]
        if output.tokens:
            one.times_s.append(now_s)
            one.num_tokens += len(output.tokens)
        if output.finish_reason is None and output.error is None:
            return
        del self._open[output.request_id]
        record = RequestRecord(
            scheduled_s=one.due_s,
            end_s=now_s,
            status="OK" if output.error is None else output.error.partition(":")[0],
            message_times_s=tuple(one.times_s),
            num_tokens=one.num_tokens,
            num_prompt_tokens=len(one.request.prompt_token_ids),
            num_cached_tokens=output.num_cached_tokens,
        )
        self._records.append(record)
        self._on_record(record)
        self._ask()


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step of the engine."""

    num_sequences: int
    num_tokens: int  # computed
    num_context_tokens: int  # in the cache at its end, of all its sequences
    wall_s: float  # scheduling, computing, handing out
    executor_s: float  # of that, between a plan and its tokens
    forward_s: float | None  # of that, in the model; None where that cannot be told

    @property
    def is_decode(self) -> bool:
        """Whether every sequence computed one token; a prompt's last one alone looks the same."""
        return self.num_tokens == self.num_sequences


class StepClock:
    """An executor that notes what goes through it, and the time it takes.

    Args:
        executor: Computes; one step at a time.
        read_forward_s: Returns the seconds spent in the model since its last call; None where
            that cannot be told from the executor's.
    """

    def __init__(
        self, executor: Executor, read_forward_s: Callable[[], float] | None = None
    ) -> None:
        self._executor = executor
        self._read_forward_s = read_forward_s
        self._plans: deque[StepPlan] = deque()
        self._last: tuple[StepPlan, float] | None = None
        self.max_in_flight = executor.max_in_flight
        self.num_blocks = executor.num_blocks

    def submit(self, plan: StepPlan) -> None:
        """Begin a step."""
        self._plans.append(plan)
        self._executor.submit(plan)

    def collect(self, timeout_s: float) -> StepResult:
        """Return the result of the oldest step."""
        start_s = time.perf_counter()
        result = self._executor.collect(timeout_s)
        self._last = self._plans.popleft(), time.perf_counter() - start_s
        return result

    def shutdown(self) -> None:
        """End the executor."""
        self._executor.shutdown()

    def take(self, wall_s: float) -> StepTime | None:
        """Return the step collected since the last call, which took `wall_s` in all."""
        if self._last is None:
            return None
        (plan, executor_s), self._last = self._last, None
        forward_s = self._read_forward_s() if self._read_forward_s else None
        return StepTime(
            num_sequences=len(plan.sequences),
            num_tokens=plan.num_tokens,
            num_context_tokens=plan.num_tokens
            + sum(sequence.num_computed_tokens for sequence in plan.sequences),
            wall_s=wall_s,
            executor_s=executor_s,
            forward_s=forward_s,
        )


class EngineServer:
    """The engine as a `Server`; keeps the time of every step.

    Args:
        engine: Whose executor is `clock`.
        clock: Around the executor that computes.
    """

    def __init__(self, engine: Engine, clock: StepClock) -> None:
        self._engine = engine
        self._clock = clock
        self.steps: list[StepTime] = []  # of the present measurement: the caller clears it

    def add(self, request: EngineRequest) -> None:
        """Queue a request."""
        self._engine.add(request)

    def step(self, emit: Emit) -> None:
        """Compute one step."""
        if not self._engine.has_work:
            raise UnavailableError("the engine has no work, but requests are open")
        start_s = time.perf_counter()
        outputs = self._engine.step()
        taken = self._clock.take(time.perf_counter() - start_s)
        if taken is not None:
            self.steps.append(taken)
        for output in outputs:
            emit(output)
