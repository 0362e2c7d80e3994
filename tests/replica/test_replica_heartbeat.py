"""A worker's heartbeat and the leader's monitor, over real channels."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from cluster.config import ClusterConfig, load_config
from cluster.errors import UnavailableError
from cluster.replica.channel import Channel, ChannelListener, channel_of, channel_pair
from cluster.replica.heartbeat import Heartbeat
from cluster.replica.monitor import GroupMonitor
from cluster.replica.processes import ThreadClock

WAIT_S = 10.0  # for what comes at once on an idle machine


@dataclass
class StepLoop:
    """As much of an engine's loop as a monitor looks at."""

    cpu_s: float = 0.0
    step_age_s: float = 0.0
    is_running: bool = True


@dataclass
class Watched:
    """A monitor, the workers' ends of its channels, and what it says."""

    monitor: GroupMonitor
    workers: list[Channel]
    loop: StepLoop
    reasons: list[str] = field(default_factory=list)
    has_failed: threading.Event = field(default_factory=threading.Event)

    def accuse(self, reason: str) -> None:
        self.reasons.append(reason)
        self.has_failed.set()


def configuration(tp: int, *overrides: str) -> ClusterConfig:
    times = ["replica.heartbeat_timeout_s=0.5", "replica.stuck_timeout_s=1.0"]
    return load_config(None, [f"parallel.tp={tp}", *times, *overrides])


@contextlib.contextmanager
def watched(tp: int, *overrides: str) -> Iterator[Watched]:
    pairs = [channel_pair(1.0) for _ in range(tp if tp > 1 else 0)]
    workers = [channel_of(theirs.detach(), send_timeout_s=1.0) for _, theirs in pairs]
    loop = StepLoop()
    config = configuration(tp, *overrides)
    monitor = GroupMonitor(
        config,
        [ours for ours, _ in pairs],
        loop,  # type: ignore[arg-type]
        lambda reason: scene.accuse(reason),
    )
    scene = Watched(monitor, workers, loop)
    monitor.start()
    try:
        yield scene
    finally:
        monitor.close()
        for worker in workers:
            worker.close()


def beat(scene: Watched, duration_s: float, *, silent: int = -1, cpu_share: float = 1.0) -> None:
    """Beat for all workers but one, and turn the event loop, until it is over or somebody fails."""
    began_s = time.monotonic()
    while (now_s := time.monotonic()) < began_s + duration_s and not scene.has_failed.is_set():
        scene.monitor.turned()
        for index, worker in enumerate(scene.workers):
            if index != silent:
                worker.send("beat", cpu_share * now_s)
        time.sleep(0.05)


def test_monitor_names_the_worker_that_fell_silent() -> None:
    with watched(2) as scene:
        beat(scene, WAIT_S, silent=1)
        assert scene.reasons == [
            "worker 1 does not answer: replica.heartbeat_timeout_s=0.5",
        ]


def test_monitor_notices_at_once_that_a_worker_is_gone() -> None:
    with watched(2, "replica.heartbeat_timeout_s=60") as scene:
        scene.workers[0].close()
        assert scene.has_failed.wait(WAIT_S)
        assert scene.reasons == ["worker 0 is gone"]


def test_monitor_lets_a_long_step_be_long() -> None:
    with watched(2) as scene:
        scene.loop.step_age_s = 3600.0
        beat(scene, 2.5)
        assert scene.reasons == []


def test_monitor_notices_a_step_in_which_nobody_computes() -> None:
    with watched(2) as scene:
        scene.loop.step_age_s = 3600.0
        beat(scene, WAIT_S, cpu_share=0.0)
        assert len(scene.reasons) == 1 and "the engine is stuck" in scene.reasons[0]


def test_monitor_notices_an_event_loop_that_hangs() -> None:
    with watched(1) as scene:
        assert scene.has_failed.wait(WAIT_S)
        assert scene.reasons == ["the leader's event loop hangs: replica.stuck_timeout_s=1"]


def test_monitor_notices_that_the_engine_has_ended() -> None:
    with watched(1) as scene:
        scene.loop.is_running = False
        beat(scene, WAIT_S)
        assert scene.reasons == ["the engine's thread has ended"]


def test_monitor_that_fails_itself_fails_the_group() -> None:
    with watched(1) as scene:
        scene.loop.step_age_s = "old"  # type: ignore[assignment]
        beat(scene, WAIT_S)
        (reason,) = scene.reasons
        assert reason.startswith("nobody watches the group: TypeError")


def test_stopped_monitor_accuses_nobody() -> None:
    with watched(2) as scene:
        scene.monitor.stop()
        assert not scene.has_failed.wait(1.0)


def test_heartbeat_tells_what_the_thread_that_made_it_computes() -> None:
    listener = ChannelListener("127.0.0.1", 1)
    leader, theirs = channel_pair(1.0)
    worker = channel_of(theirs.detach(), send_timeout_s=1.0)
    accepting = ThreadPoolExecutor(1).submit(
        listener.accept_all, timeout_s=WAIT_S, send_timeout_s=1.0, on_ready=lambda *_: None
    )
    heartbeat = Heartbeat(worker, end_process=lambda: None)
    try:
        heartbeat.begin(0, listener.address, listener.auth_key)
        (beats,) = accepting.result(WAIT_S)
        _, idle_s = beats.receive()
        compute_until_s = time.thread_time() + 0.2
        while time.thread_time() < compute_until_s:
            pass
        told_s = [beats.receive()[1] for _ in range(10)]  # those on the way know less
        assert idle_s + 0.19 <= told_s[-1] < idle_s + 1.0, "waiting is not computing"
    finally:
        heartbeat.close()
        listener.close()
    with pytest.raises(UnavailableError):
        while True:
            beats.receive()
    leader.close()


def test_worker_that_is_stuck_ends_when_its_leader_is_gone() -> None:
    leader, theirs = channel_pair(1.0)
    worker = channel_of(theirs.detach(), send_timeout_s=1.0)
    has_ended = threading.Event()
    heartbeat = Heartbeat(worker, end_process=has_ended.set)
    leader.send("plan", b"that nobody reads")
    assert not has_ended.wait(0.6), "a message is no end"
    leader.close()
    assert has_ended.wait(WAIT_S)
    heartbeat.close()
    worker.close()


def test_worker_that_ends_by_itself_is_not_ended() -> None:
    leader, theirs = channel_pair(1.0)
    worker = channel_of(theirs.detach(), send_timeout_s=1.0)
    has_ended = threading.Event()
    heartbeat = Heartbeat(worker, end_process=has_ended.set)
    leader.close()
    heartbeat.close()
    assert not has_ended.wait(0.5)
    worker.close()


def test_clock_of_a_thread_outlives_it() -> None:
    clocks: list[ThreadClock] = []

    def compute() -> None:
        clocks.append(ThreadClock())
        while clocks[0].read() < 0.05:
            pass

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert 0.05 <= clocks[0].read() < 1.0
