"""Movers and leaders that are stopped and killed: streams go on, and nothing is left behind."""

from __future__ import annotations

import asyncio
import signal

import psutil
import pytest
from fault_cluster import REQUEST_TIMEOUT_S, answers, check_answers, prompt_mix
from fault_scene import KEYS, Scene, mover_of, movers_of
from waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

TIMEOUT_S = 0.5  # store.timeout_s
SLACK_S = 1.0  # of a busy machine
REBUILD_S = 90.0
RESTART_S = 20.0


def ttft_s(scene: Scene) -> float:
    """Return how long the longest prompt waits for its first token where nothing is cached."""
    scene.flush_replicas()
    ask = prompt_mix()[-1]
    done = scene.client.generate(
        token_ids=ask.prompt, sampling=ask.sampling, timeout_s=REQUEST_TIMEOUT_S
    )
    return done.timings.ttft_s


def test_stopped_movers_cost_a_deadline_and_come_back(scene: Scene) -> None:
    scene.wait_for_order()
    undisturbed_s = max(ttft_s(scene) for _ in range(3))
    movers = [mover_of(pid) for pid in scene.leader_pids()]

    def stop() -> None:
        for mover in movers:
            mover.suspend()
        scene.flush_replicas()

    mix, key = prompt_mix(), KEYS["root"]
    try:
        check_answers(
            asyncio.run(answers(scene.address, mix, key, num_rounds=3, when_running=stop))
        )
        assert all(mover.status() == psutil.STATUS_STOPPED for mover in movers)
        for _ in range(3):
            assert ttft_s(scene) < undisturbed_s + TIMEOUT_S + SLACK_S
    finally:
        for mover in movers:
            mover.resume()
    scene.wait_for_order()
    scene.wait_for_hits()


def test_killed_leader_leaves_no_mover_behind(scene: Scene) -> None:
    before = scene.leader_pids()
    movers = [mover_of(pid) for pid in before]
    psutil.Process(before[0]).send_signal(signal.SIGKILL)
    wait_until(lambda: not movers[0].is_running(), 5.0, "the mover ends with its leader")
    assert movers[1].is_running()
    wait_until(
        lambda: len(scene.leader_pids()) == 2 and before[0] not in scene.leader_pids(),
        REBUILD_S,
        "the group is built anew",
    )
    scene.wait_for_order()
    assert all(mover_of(pid).is_running() for pid in scene.leader_pids())


def test_killed_mover_fails_nothing_and_is_started_again(scene: Scene) -> None:
    scene.wait_for_order()
    leader, _ = scene.leader_pids()
    killed = mover_of(leader)

    def kill() -> None:
        killed.kill()
        scene.flush_replicas()

    mix, key = prompt_mix(), KEYS["root"]
    check_answers(asyncio.run(answers(scene.address, mix, key, num_rounds=3, when_running=kill)))

    def is_back() -> bool:  # nobody misses a mover before it is asked
        scene.flush_replicas()
        check_answers(asyncio.run(answers(scene.address, mix, key)))
        return any(mover.pid != killed.pid for mover in movers_of(leader))

    wait_until(is_back, RESTART_S, "there is another mover")
    scene.wait_for_order()
    scene.wait_for_hits()
