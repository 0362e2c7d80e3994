"""The closed loop that drives an engine: order, limits, budget, times."""

from __future__ import annotations

from collections import deque

from cluster.bench.engine_drive import (
    Emit,
    EngineServer,
    Pace,
    StepClock,
    drive,
    greedy_request,
)
from cluster.clock import VirtualClock
from cluster.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.types import EngineOutput, EngineRequest, FinishReason, SampledToken
from tests.fakes import FakeExecutor

NUM_TOKENS = 3
STEP_S = 1.0


class FakeServer:
    """Gives every request that it has one token per step."""

    def __init__(self, clock: VirtualClock, error_of: str = "") -> None:
        self._clock = clock
        self._error_of = error_of
        self._open: deque[tuple[EngineRequest, int]] = deque()
        self.max_num_open = 0
        self.sizes_at_add: list[int] = []

    def add(self, request: EngineRequest) -> None:
        self.sizes_at_add.append(len(self._open))
        self._open.append((request, request.sampling.max_tokens))
        self.max_num_open = max(self.max_num_open, len(self._open))

    def step(self, emit: Emit) -> None:
        self._clock.advance(STEP_S)
        for _ in range(len(self._open)):
            request, num_left = self._open.popleft()
            if request.request_id == self._error_of:
                emit(EngineOutput(request.request_id, error="DEADLINE_EXCEEDED: late"))
                continue
            reason = FinishReason.LENGTH if num_left == 1 else None
            emit(EngineOutput(request.request_id, (SampledToken(7),), 2, reason))
            if num_left > 1:
                self._open.append((request, num_left - 1))


def requests(count: int) -> list[EngineRequest]:
    return [greedy_request(str(index), [1, 2, 3, 4], NUM_TOKENS) for index in range(count)]


def test_drive_counts_every_token_of_a_batch() -> None:
    clock = VirtualClock()
    records = drive(FakeServer(clock), requests(5), Pace(5, 5), clock)
    assert len(records) == 5
    for record in records:
        assert (record.status, record.num_tokens) == ("OK", NUM_TOKENS)
        assert (record.num_prompt_tokens, record.num_cached_tokens) == (4, 2)
        assert record.ttft_s == STEP_S
        assert record.tpot_s == STEP_S
        assert record.end_s == NUM_TOKENS * STEP_S


def test_drive_gives_the_server_no_more_than_it_may_have_and_counts_the_waiting() -> None:
    clock = VirtualClock()
    server = FakeServer(clock)
    records = drive(server, requests(6), Pace(num_users=4, max_at_once=1), clock)
    assert server.max_num_open == 1
    answer_s = NUM_TOKENS * STEP_S
    # The fourth user waits for three others; later ones always find three before them.
    waits = [0, 1, 2, 3, 3, 3]
    assert [record.ttft_s for record in records] == [w * answer_s + STEP_S for w in waits]


def test_drive_keeps_the_users_busy() -> None:
    clock = VirtualClock()
    server = FakeServer(clock)
    assert len(drive(server, requests(9), Pace(num_users=2, max_at_once=8), clock)) == 9
    assert server.max_num_open == 2


def test_drive_that_waits_for_all_begins_a_batch_on_an_empty_server() -> None:
    clock = VirtualClock()
    server = FakeServer(clock)
    mixed = [greedy_request(str(i), [1], 1 + i % 3) for i in range(6)]
    drive(server, mixed, Pace(3, 3, waits_for_all=True), clock)
    assert server.sizes_at_add == [0, 1, 2, 0, 1, 2]


def test_drive_begins_nothing_after_its_budget_and_finishes_what_runs() -> None:
    clock = VirtualClock()
    pace = Pace(num_users=4, max_at_once=1, budget_s=NUM_TOKENS * STEP_S + 0.5)
    records = drive(FakeServer(clock), requests(100), pace, clock)
    assert [record.num_tokens for record in records] == [NUM_TOKENS] * 2


def test_drive_runs_one_request_however_small_the_budget() -> None:
    clock = VirtualClock()
    records = drive(FakeServer(clock), requests(3), Pace(3, 1, budget_s=-1.0), clock)
    assert len(records) == 1


def test_drive_records_a_failure_by_its_code() -> None:
    clock = VirtualClock()
    records = drive(FakeServer(clock, error_of="1"), requests(3), Pace(3, 3), clock)
    status = sorted(record.status for record in records)
    assert status == ["DEADLINE_EXCEEDED", "OK", "OK"]


def test_engine_server_notes_every_step() -> None:
    executor = FakeExecutor(num_blocks=32, block_size=4, vocab_size=100)
    step_clock, clock = StepClock(executor, lambda: 0.0), VirtualClock()
    engine = Engine(
        EngineConfig(),
        executor=step_clock,
        block_size=4,
        max_model_len=64,
        fingerprint=b"model",
        eos_token_ids=frozenset(),
        vocab_size=100,
        prefix_caching=False,
        clock=clock,
    )
    server = EngineServer(engine, step_clock)
    records = drive(server, requests(2), Pace(2, 2), clock)
    assert [record.num_tokens for record in records] == [NUM_TOKENS] * 2
    # Two prompts of four tokens, then a token of each per step; the last one is never computed.
    sizes = [(s.num_sequences, s.num_tokens, s.num_context_tokens) for s in server.steps]
    assert sizes == [(2, 8, 8), (2, 2, 10), (2, 2, 12)]
    assert [step.is_decode for step in server.steps] == [False, True, True]
    assert all(0 <= s.executor_s <= s.wall_s and s.forward_s == 0 for s in server.steps)
