"""Commands of an engine's loop that answer, with a real engine on a fake executor and mover."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest
from mover_fakes import HASHES, ScriptedMover

from cluster.clock import WallClock
from cluster.config import EngineConfig, StoreConfig
from cluster.engine.engine import Engine
from cluster.engine.mover import MoveKind
from cluster.errors import OverloadedError, UnavailableError
from cluster.replica.engine_loop import EngineLoop, EngineUpdate
from cluster.types import EngineOutput, EngineRequest, FinishReason, SamplingParams
from tests.fakes import FakeExecutor


def make_loop(mover: ScriptedMover | None, *, max_commands: int = 8) -> EngineLoop:
    engine = Engine(
        EngineConfig(),
        executor=FakeExecutor(num_blocks=32, block_size=4, vocab_size=1000),
        block_size=4,
        max_model_len=256,
        fingerprint=b"model",
        eos_token_ids=frozenset(),
        vocab_size=1000,
        prefix_caching=True,
        clock=WallClock(),
        num_host_slots=8 if mover else 0,
        block_nbytes=2**20,
        mover=mover,
        store_config=StoreConfig(),
    )
    return EngineLoop(
        engine,
        publish=updates_of(engine).append,
        fail=lambda reason: None,
        load_interval_s=0.005,
        max_commands=max_commands,
    )


def updates_of(engine: Engine) -> list[EngineUpdate]:
    updates: list[EngineUpdate] = []
    engine.updates = updates  # type: ignore[attr-defined]
    return updates


@contextlib.contextmanager
def running(mover: ScriptedMover | None) -> Iterator[EngineLoop]:
    loop = make_loop(mover)
    loop.start()
    try:
        yield loop
    finally:
        loop.stop(5)


def test_preload_is_done_when_all_blocks_have_come() -> None:
    mover = ScriptedMover()
    mover.is_silent = True
    with running(mover) as loop:
        first = loop.preload(HASHES[:3])
        with pytest.raises(FutureTimeoutError):
            first.result(0.05)
        mover.is_silent = False
        assert first.result(5) == 3
        assert loop.preload(HASHES[3:5]).result(5) == 2, "counted from its own beginning"
    (move, *_) = mover.moves
    assert (move.kind, move.hashes) == (MoveKind.GET, HASHES[:3])


def test_preload_that_fails_loads_nothing() -> None:
    mover = ScriptedMover()
    mover.error = "the store is away"
    with running(mover) as loop:
        assert loop.preload(HASHES[:3]).result(5) == 0


def test_preload_without_a_store_loads_nothing() -> None:
    with running(None) as loop:
        assert loop.preload(HASHES).result(5) == 0


def test_preload_that_nobody_waits_for_any_more_harms_nobody() -> None:
    mover = ScriptedMover()
    mover.is_silent = True
    with running(mover) as loop:
        begun = loop.preload(HASHES[:1])
        wait_until(lambda: bool(mover.moves))
        assert not begun.cancel(), "it is under way"
        mover.is_silent = False
        assert begun.result(5) == 1
    loop = make_loop(mover)
    waiting = [loop.preload(HASHES), loop.flush_cache()]
    assert all(future.cancel() for future in waiting)
    loop.start()
    assert loop.flush_cache().result(5) == 0
    assert loop.is_running
    loop.stop(5)


def test_flush_tells_how_many_blocks_were_forgotten() -> None:
    mover = ScriptedMover()
    with running(mover) as loop:
        assert loop.preload(HASHES[:3]).result(5) == 3
        mover.error = "there is nothing for this prompt"
        loop.submit(EngineRequest("a", tuple(range(9)), SamplingParams(max_tokens=1)))
        updates = loop._engine.updates  # type: ignore[attr-defined]
        wait_until(lambda: any(o.finish_reason for update in list(updates) for o in update.outputs))
        assert loop.flush_cache().result(5) >= 3 + 2
        assert loop.flush_cache().result(5) == 0


def test_commands_are_bounded_and_end_with_the_loop() -> None:
    loop = make_loop(ScriptedMover(), max_commands=2)
    waiting = [loop.preload(HASHES), loop.flush_cache()]
    for command in (loop.flush_cache, lambda: loop.preload(HASHES)):
        with pytest.raises(OverloadedError, match="limit=2"):
            command()
    loop._engine.step = broken  # type: ignore[method-assign]
    loop.start()
    assert waiting[1].result(5) == 0  # carried out before the step that fails
    with pytest.raises(UnavailableError, match="has stopped"):
        waiting[0].result(5)
    with pytest.raises(UnavailableError, match="has stopped"):
        loop.flush_cache()


def test_request_is_handed_over_between_two_steps() -> None:
    loop = make_loop(None)
    for name in ("a", "b"):
        loop.submit(EngineRequest(name, tuple(range(9)), SamplingParams(max_tokens=60)))
    loop.hand_over("a")
    loop.hand_over("unknown")
    loop.abort("b")
    loop.start()
    updates = loop._engine.updates  # type: ignore[attr-defined]
    wait_until(lambda: sum(len(ends_of(update)) for update in list(updates)) == 2)
    ends = {output.request_id: output.finish_reason for u in updates for output in ends_of(u)}
    assert ends == {"a": FinishReason.MOVED, "b": FinishReason.CANCELLED}
    loop.stop(5)


def test_failed_engine_loses_its_requests() -> None:
    loop = make_loop(None)
    loop._engine._executor.collect_fails = True  # type: ignore[attr-defined]
    loop.submit(EngineRequest("a", (1,), SamplingParams()))
    loop.start()
    updates = loop._engine.updates  # type: ignore[attr-defined]
    wait_until(lambda: any(ends_of(update) for update in list(updates)))
    assert [o.error for u in updates for o in ends_of(u)] == ["LOST: worker 0 died"]


def test_processor_time_is_that_of_the_engines_thread() -> None:
    loop = make_loop(None)
    assert loop.cpu_s == 0.0
    loop.start()
    wait_until(lambda: loop.cpu_s > 0.0)
    loop.stop(5)
    assert loop.cpu_s > 0.0, "it may be asked for when the thread has ended"


def ends_of(update: EngineUpdate) -> list[EngineOutput]:
    return [output for output in update.outputs if output.finish_reason or output.error]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def broken() -> list[object]:
    raise UnavailableError("worker 0 died")


def test_command_that_hangs_is_a_step_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked, go_on = threading.Event(), threading.Event()

    def add(self: Engine, request: EngineRequest) -> None:
        blocked.set()
        go_on.wait(10)

    monkeypatch.setattr(Engine, "add", add)
    with running(None) as loop:
        loop.submit(EngineRequest("r", (1, 2), SamplingParams()))
        assert blocked.wait(5)
        first_s = loop.step_age_s
        time.sleep(0.05)
        assert loop.step_age_s >= first_s + 0.04
        go_on.set()


def test_engine_whose_thread_is_ended_from_within_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures: list[str] = []
    loop = make_loop(None)
    loop._fail = failures.append

    def step(self: Engine) -> list[EngineOutput]:
        raise SystemExit(1)

    monkeypatch.setattr(Engine, "step", step)
    loop.start()
    deadline_s = time.monotonic() + 5
    while loop.is_running and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert failures == ["SystemExit(1)"]
