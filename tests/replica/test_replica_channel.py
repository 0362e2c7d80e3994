"""Channels between real processes' ends: authenticated, bounded, and loud when the peer dies."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import UnavailableError
from cluster.replica.channel import Channel, ChannelListener, connect
from cluster.replica.executor import GroupExecutor
from cluster.step import BlockMoves, SampleSpec, SequenceStep, StepPlan, StepResult
from cluster.types import SampledToken, TokenLogprob


def join(listener: ChannelListener, num_workers: int) -> tuple[list[Channel], list[Channel]]:
    """Return the leader's ends and the workers' ends, workers calling in reverse order."""
    pool = ThreadPoolExecutor(1)
    accepting: Future[list[Channel]] = pool.submit(
        listener.accept_all, timeout_s=10, send_timeout_s=0.3, on_ready=lambda index, facts: None
    )
    ends = {}
    for index in reversed(range(num_workers)):
        ends[index] = connect(listener.address, listener.auth_key, send_timeout_s=0.3)
        ends[index].send("hello", index)
    for index, end in ends.items():
        end.send("ready", index, {})
    return accepting.result(timeout=5), [ends[index] for index in range(num_workers)]


@pytest.fixture
def pair() -> Any:
    listener = ChannelListener("127.0.0.1", 2)
    leader, workers = join(listener, 2)
    listener.close()
    yield leader, workers
    for channel in (*leader, *workers):
        channel.close()


def plan(step_id: int = 1) -> StepPlan:
    spec = SampleSpec(7, 5, 0.5, 3, 0.9, 0.0, 1.1, 0.0, 0.0, 2, (1,), (1, 2), (3,))
    return StepPlan(
        step_id,
        (SequenceStep(1, (5, 6), 3, (0, 2), spec), SequenceStep(2, (9,), 0, (4,), None)),
    )


def test_plan_and_result_survive_the_wire() -> None:
    assert StepPlan.decode(plan().encode()) == plan()
    result = StepResult(3, {4: SampledToken(5, -0.5, (TokenLogprob(5, -0.5),))}, 0.25)
    assert StepResult.decode(result.encode()) == result


def test_channels_are_ordered_by_index_however_workers_call(pair: Any) -> None:
    leader, workers = pair
    workers[1].send("result", b"one")
    assert leader[1].receive() == ("result", b"one")


def test_stranger_without_the_key_is_refused_and_disturbs_nobody() -> None:
    listener = ChannelListener("127.0.0.1", 1)
    pool = ThreadPoolExecutor(1)
    accepting = pool.submit(
        listener.accept_all, timeout_s=10, send_timeout_s=1, on_ready=lambda i, f: None
    )
    with pytest.raises(UnavailableError):
        connect(listener.address, b"wrong", send_timeout_s=1)
    worker = connect(listener.address, listener.auth_key, send_timeout_s=1)
    worker.send("hello", 0)
    worker.send("ready", 0, {})
    (leader,) = accepting.result(timeout=5)
    listener.close()
    worker.send("result", b"")
    assert leader.receive() == ("result", b"")
    leader.close()
    worker.close()


def test_closing_the_listener_ends_the_wait() -> None:
    listener = ChannelListener("127.0.0.1", 1)
    pool = ThreadPoolExecutor(1)
    accepting = pool.submit(
        listener.accept_all, timeout_s=10, send_timeout_s=1, on_ready=lambda i, f: None
    )
    time.sleep(0.05)
    listener.close()
    with pytest.raises(UnavailableError):
        accepting.result(timeout=5)


def test_closing_the_listener_ends_the_wait_for_a_worker_that_hangs() -> None:
    listener = ChannelListener("127.0.0.1", 1)
    pool = ThreadPoolExecutor(1)
    accepting = pool.submit(
        listener.accept_all, timeout_s=30, send_timeout_s=1, on_ready=lambda i, f: None
    )
    worker = connect(listener.address, listener.auth_key, send_timeout_s=1)
    worker.send("hello", 0)
    time.sleep(0.1)
    listener.close()
    with pytest.raises(UnavailableError, match="did not start"):
        accepting.result(timeout=5)
    worker.close()


def test_worker_that_hangs_ends_the_wait_when_the_time_is_over() -> None:
    listener = ChannelListener("127.0.0.1", 1)
    pool = ThreadPoolExecutor(1)
    accepting = pool.submit(
        listener.accept_all, timeout_s=0.2, send_timeout_s=1, on_ready=lambda i, f: None
    )
    worker = connect(listener.address, listener.auth_key, send_timeout_s=1)
    worker.send("hello", 0)
    with pytest.raises(UnavailableError, match=r"replica\.start_timeout_s"):
        accepting.result(timeout=5)
    listener.close()
    worker.close()


def test_worker_that_fails_to_start_is_reported_with_its_reason() -> None:
    listener = ChannelListener("127.0.0.1", 1)
    pool = ThreadPoolExecutor(1)
    accepting = pool.submit(
        listener.accept_all, timeout_s=10, send_timeout_s=1, on_ready=lambda i, f: None
    )
    worker = connect(listener.address, listener.auth_key, send_timeout_s=1)
    worker.send("hello", 0)
    worker.send("failed", 0, "no such file")
    with pytest.raises(UnavailableError, match="worker 0: no such file"):
        accepting.result(timeout=5)
    listener.close()
    worker.close()


def test_worker_that_ends_while_it_starts_is_named() -> None:
    listener = ChannelListener("127.0.0.1", 1)
    pool = ThreadPoolExecutor(1)
    accepting = pool.submit(
        listener.accept_all, timeout_s=10, send_timeout_s=1, on_ready=lambda i, f: None
    )
    worker = connect(listener.address, listener.auth_key, send_timeout_s=1)
    worker.send("hello", 0)
    worker.close()
    with pytest.raises(UnavailableError, match="worker 0 ended without a word"):
        accepting.result(timeout=5)
    listener.close()


def test_executor_returns_results_in_the_order_of_the_steps(pair: Any) -> None:
    leader, workers = pair
    executor = GroupExecutor(leader, num_blocks=8, num_stages=2)
    executor.submit(plan(1))
    executor.submit(plan(2))
    assert StepPlan.decode(workers[0].receive()[1]) == plan(1)
    for step_id in (1, 2):
        workers[1].send("result", StepResult(step_id, {1: SampledToken(step_id)}).encode())
    assert [executor.collect(1.0).step_id for _ in range(2)] == [1, 2]


def test_listener_may_be_closed_twice() -> None:
    listener = ChannelListener("127.0.0.1", 1)
    listener.close()
    listener.close()


def test_executor_waits_for_every_worker_that_moves_blocks(pair: Any) -> None:
    leader, workers = pair
    executor = GroupExecutor(leader, num_blocks=8, num_stages=2)
    moving = replace(plan(1), moves=BlockMoves(offloads=((0, 0),)))
    executor.submit(moving)
    executor.submit(plan(2))
    executor.submit(replace(moving, step_id=3))
    assert StepPlan.decode(workers[0].receive()[1]) == moving
    for step_id in (1, 2, 3):
        workers[1].send("result", StepResult(step_id, {1: SampledToken(step_id)}).encode())
    with pytest.raises(UnavailableError, match="a worker hangs"):
        executor.collect(0.05)
    workers[0].send("moved", 1)
    assert [executor.collect(1.0).step_id for _ in range(2)] == [1, 2]
    with pytest.raises(UnavailableError, match="a worker hangs"):
        executor.collect(0.05)
    workers[0].send("moved", 3)
    assert executor.collect(1.0).step_id == 3


def test_executor_notices_a_dead_worker_at_once(pair: Any) -> None:
    leader, workers = pair
    executor = GroupExecutor(leader, num_blocks=8, num_stages=1)
    executor.submit(plan())
    workers[0].close()
    start_s = time.monotonic()
    with pytest.raises(UnavailableError, match="worker 0 is gone"):
        executor.collect(timeout_s=30)
    assert time.monotonic() - start_s < 5


def test_executor_gives_a_hanging_worker_up_after_the_timeout(pair: Any) -> None:
    leader, _ = pair
    executor = GroupExecutor(leader, num_blocks=8, num_stages=1)
    executor.submit(plan())
    with pytest.raises(UnavailableError, match=r"engine.step_timeout_s=0.05"):
        executor.collect(timeout_s=0.05)


def test_executor_passes_a_workers_error_on(pair: Any) -> None:
    leader, workers = pair
    executor = GroupExecutor(leader, num_blocks=8, num_stages=1)
    workers[1].send("error", "out of memory")
    with pytest.raises(UnavailableError, match="worker 1 failed: out of memory"):
        executor.collect(timeout_s=1)


def test_executor_does_not_wait_forever_for_a_worker_that_reads_nothing(pair: Any) -> None:
    leader, _ = pair
    executor = GroupExecutor(leader, num_blocks=8, num_stages=1)
    big = StepPlan(1, (SequenceStep(1, tuple(range(4_000_000)), 0, (0,), None),))
    with pytest.raises(UnavailableError, match="worker 0 is gone"):
        executor.submit(big)


def test_executor_shutdown_tells_the_workers_to_stop(pair: Any) -> None:
    leader, workers = pair
    GroupExecutor(leader, num_blocks=8, num_stages=1).shutdown()
    assert workers[0].receive() == ("stop",)
    with pytest.raises(UnavailableError):
        workers[0].receive()
