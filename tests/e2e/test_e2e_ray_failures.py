"""Ray's own processes end under load: streams go on, and Ray heals the cluster afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
from e2e_scene import (
    CONTROLLER,
    GATEWAY,
    LEADER,
    NUM_GATEWAYS,
    REBUILD_S,
    Scene,
    is_there,
    processes,
    ready_replicas,
    running_scene,
    wait_for_order,
)
from e2e_streams import Streams, ask_mix, wait_until
from ray import serve

from cluster.gateway.app import APP_NAME

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

NUM_STREAMS = 16
NUM_TOKENS = 32  # of an answer
ROUND_S = 50.0  # two requests of each stream; less than the 60 s that nodes wait for the head
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
    wait_for_order(scene.client, without=set())
    (node,) = scene.nodes.worker_nodes
    (raylet,) = node.all_processes["raylet"]
    lost = psutil.Process(raylet.process.pid).children(recursive=True)
    lost_pids = {process.pid for process in lost}
    lost_leaders = {replica.leader_pid for replica in ready_replicas(scene.client)} & lost_pids
    assert lost_leaders, "Serve spreads groups over the nodes"
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
    assert serve.status().applications[APP_NAME].status == "RUNNING"
