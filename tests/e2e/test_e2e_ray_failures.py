"""Ray's own processes end under load: streams go on, and Ray heals the cluster afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from e2e_scene import (
    CONTROLLER,
    GATEWAY,
    LEADER,
    NODE,
    NUM_GATEWAYS,
    REBUILD_S,
    Scene,
    is_there,
    processes,
    ready_replicas,
    running_scene,
    wait_for_order,
)
from e2e_streams import Streams, ask_mix
from waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

NUM_STREAMS = 16
NUM_TOKENS = 32  # of an answer
ROUND_S = 50.0  # two requests of each stream; less than the 60 s that nodes wait for the head
DRAIN_NODE_S = 60  # as long as a pod may take to terminate
MAX_KILLS = 6  # Serve spreads groups over the nodes, but not always
ORPHANS_S = 10.0  # processes of a node end by themselves when its raylet has; 1 to 2 s


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with running_scene() as scene:
        yield scene


def test_killed_serve_controller_disturbs_no_stream_and_heals_again(scene: Scene) -> None:
    before = {process.pid for process in processes(LEADER) + processes(GATEWAY)}
    (killed,) = processes(CONTROLLER)
    with Streams(scene.address, ask_mix(NUM_STREAMS, NUM_TOKENS)) as streams:
        killed.kill()
        streams.wait_for_round(ROUND_S)
        wait_until(
            lambda: any(process != killed for process in processes(CONTROLLER)),
            REBUILD_S,
            "there is another controller",
        )
        streams.wait_for_round(ROUND_S)
    streams.verdict.check(at_least=4 * NUM_STREAMS)
    # the new controller has found the replicas again, and replaced none
    assert {process.pid for process in processes(LEADER) + processes(GATEWAY)} == before
    scene.check_healing()


def test_restarted_control_plane_disturbs_no_stream_and_heals_again(scene: Scene) -> None:
    before = {process.pid for process in processes(LEADER) + processes(GATEWAY)}
    with Streams(scene.address, ask_mix(NUM_STREAMS, NUM_TOKENS)) as streams:
        with scene.no_control_plane():
            streams.wait_for_round(ROUND_S)
            assert not processes("gcs_server")
        streams.wait_for_round(ROUND_S)
    streams.verdict.check(at_least=4 * NUM_STREAMS)
    assert {process.pid for process in processes(LEADER) + processes(GATEWAY)} == before
    scene.check_healing()


def test_lost_node_takes_its_processes_with_it_and_no_stream(scene: Scene) -> None:
    (node,) = scene.nodes.worker_nodes
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    leader_on(scene, raylet)
    lost = raylet.children(recursive=True)
    lost_pids = {process.pid for process in lost}
    lost_leaders = {replica.leader_pid for replica in ready_replicas(scene.client)} & lost_pids
    assert lost_leaders, "it has a group"
    with Streams(scene.address, ask_mix(NUM_STREAMS, NUM_TOKENS)) as streams:
        scene.nodes.remove_node(node, allow_graceful=False)
        wait_until(
            lambda: not any(is_there(process) for process in lost),
            ORPHANS_S,
            "nothing of the node is left",
        )
        streams.wait_for_round(REBUILD_S)
        wait_for_order(scene.client, without=lost_leaders)
        streams.wait_for_round(ROUND_S)
    streams.verdict.check(at_least=4 * NUM_STREAMS)
    wait_until(lambda: len(processes(GATEWAY)) == NUM_GATEWAYS, REBUILD_S, "all gateways are there")
    scene.wait_running()


def test_drained_node_hands_its_streams_over_and_is_left(scene: Scene) -> None:
    """What the chart's pods do before they end."""
    node = scene.nodes.add_node(**NODE)
    leader = leader_on(scene, psutil.Process(node.all_processes["raylet"][0].process.pid))
    with Streams(scene.address, ask_mix(NUM_STREAMS, NUM_TOKENS)) as streams:
        streams.wait_for_round(ROUND_S)
        drain_node(scene.nodes.address, node.node_id)
        # Later Ray itself ends what is left there.
        wait_until(lambda: not is_there(leader), DRAIN_NODE_S / 2, "its group has left the node")
        streams.wait_for_round(ROUND_S)
        wait_for_order(scene.client, without={leader.pid})
        scene.nodes.remove_node(node)
        streams.wait_for_round(ROUND_S)
    streams.verdict.check(at_least=6 * NUM_STREAMS)
    scene.wait_running()


def leader_on(scene: Scene, raylet: psutil.Process) -> psutil.Process:
    """Return the leader of a group on a node, killing those elsewhere until there is one."""
    for _ in range(MAX_KILLS):
        wait_for_order(scene.client, without=set())
        pids = {replica.leader_pid for replica in ready_replicas(scene.client)}
        if found := [process for process in raylet.children(recursive=True) if process.pid in pids]:
            return found[0]
        killed = min(pids)
        psutil.Process(killed).kill()
        wait_for_order(scene.client, without={killed})
    raise AssertionError("Serve puts no group on that node")


def drain_node(address: str, node_id: str) -> None:
    """Tell Ray that a node goes away."""
    command = [
        *(str(Path(sys.executable).parent / "ray"), "drain-node", "--address", address),
        *("--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", "the test drains it"),
        *("--deadline-remaining-seconds", str(DRAIN_NODE_S)),
    ]
    subprocess.run(command, check=True, timeout=60)
    assert [n["Alive"] for n in ray.nodes() if n["NodeID"] == node_id] == [True]
