"""Every replica is replaced, or one drained, under streams: none is lost, and all leave in time."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from e2e_scene import (
    DRAIN_S,
    GATEWAY,
    LEADER,
    NUM_GATEWAYS,
    NUM_GROUPS,
    cluster_config,
    is_there,
    processes,
    ready_replicas,
    wait_for_order,
)
from e2e_streams import VOCAB_SIZE, Streams, ask_mix, undisturbed
from ray import serve
from redis_server import RedisServer
from safetensors.torch import load_file, save_file
from waiting import wait_until

from cluster.client import Client, ReplicaState, Running, TextDelta
from cluster.gateway.app import APP_NAME, ServingCluster, build, check, start
from cluster.types import SamplingParams

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

NUM_STREAMS = 32
ROUND_S = 60.0
NUM_PROMPT_TOKENS = 1200  # which are read faster than computed
SLACK_S = 4.0  # of a busy machine; Serve kills a gateway 5 s after its drain's time


@pytest.fixture(scope="module")
def cluster(redis_server: RedisServer) -> Iterator[ServingCluster]:
    config = cluster_config(redis_server.url)
    check(config)
    with start(config) as running:
        yield running


class Upgrade:
    """Looks on, in a thread, while Serve replaces all replicas.

    Args:
        port: That the gateways share.
    """

    def __init__(self, port: int) -> None:
        self.fewest_listening = 2**16  # gateways, at any time
        self.longest_stop_s: dict[str, float] = {}  # by deployment; a short one may not be seen
        self._port = port
        self._stopping_since_s: dict[str, float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_on)

    def run(self, application: serve.Application) -> None:
        """Deploy another version, and return when it has replaced the one that runs."""
        self._thread.start()
        try:
            serve.run(application, name=APP_NAME, route_prefix=None)
        finally:
            self._is_over.set()
            self._thread.join()

    def _look_on(self) -> None:
        while not self._is_over.wait(0.1):
            listening = sum(self._listens(process) for process in processes(GATEWAY))
            self.fewest_listening = min(self.fewest_listening, listening)
            now_s = time.monotonic()
            for name, deployment in serve.status().applications[APP_NAME].deployments.items():
                if not deployment.replica_states.get("STOPPING"):
                    self._stopping_since_s.pop(name, None)
                    continue
                lasts_s = now_s - self._stopping_since_s.setdefault(name, now_s)
                self.longest_stop_s[name] = max(lasts_s, self.longest_stop_s.get(name, 0.0))

    def _listens(self, process: psutil.Process) -> bool:
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.Error:  # it has just ended
            return False
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == self._port
            for connection in connections
        )


def test_upgrade_of_every_replica_loses_no_stream(cluster: ServingCluster) -> None:
    plain = cluster.config.model_dump()
    plain["engine"]["max_num_waiting"] -= 1  # what has changed does not matter
    before = processes(LEADER) + processes(GATEWAY)
    assert len(before) == NUM_GROUPS + NUM_GATEWAYS
    upgrade = Upgrade(cluster.config.gateway.port)
    with Streams(cluster.address, ask_mix(NUM_STREAMS)) as streams:
        upgrade.run(build(plain))
        streams.wait_for_round(ROUND_S)
    wait_until(lambda: not any(map(is_there, before)), DRAIN_S + SLACK_S, "the old ones are gone")
    with Client(cluster.address) as client:
        wait_for_order(client, without={process.pid for process in before})
    streams.verdict.check(at_least=2 * NUM_STREAMS)
    assert upgrade.fewest_listening >= 1, "for a moment nobody took connections"
    assert upgrade.fewest_listening <= NUM_GATEWAYS, "nobody looked on"
    assert max(upgrade.longest_stop_s.values(), default=0.0) <= DRAIN_S + SLACK_S


def test_drained_replica_is_gone_in_time_and_loses_no_stream(cluster: ServingCluster) -> None:
    with Client(cluster.address) as client:
        wait_for_order(client, without=set())
        with Streams(cluster.address, ask_mix(NUM_STREAMS)) as streams:
            streams.wait_for_round(ROUND_S)
            wait_until(lambda: busiest(client).num_running >= NUM_STREAMS / 4, ROUND_S, "a wave")
            drained = busiest(client)
            leader = psutil.Process(drained.leader_pid)
            assert client.drain_replica(drained.replica_id) > 0, "it has requests to hand over"
            wait_until(lambda: not is_there(leader), DRAIN_S + SLACK_S, "the replica is gone")
            streams.wait_for_round(ROUND_S)
        wait_for_order(client, without={leader.pid})
    streams.verdict.check(at_least=4 * NUM_STREAMS)


def busiest(client: Client) -> ReplicaState:
    """Return the replica with the most requests: streams come and go in waves."""
    return max(ready_replicas(client), key=lambda replica: replica.num_running)


def test_drained_replica_hands_its_blocks_over_through_the_store(cluster: ServingCluster) -> None:
    sampling = SamplingParams(max_tokens=400, temperature=0.8, seed=3, ignore_eos=True)
    prompt = [(7 * i * i) % VOCAB_SIZE for i in range(NUM_PROMPT_TOKENS)]
    with Client(cluster.address) as client:
        wait_for_order(client, without=set())
        before = {replica.replica_id: replica.cache for replica in ready_replicas(client)}
        tokens: list[int] = []
        places: list[str] = []
        is_asked = False
        for event in client.stream(token_ids=prompt, sampling=sampling, timeout_s=60):
            if isinstance(event, Running):
                places.append(event.replica_id)
            elif isinstance(event, TextDelta):
                tokens += event.token_ids
                if not is_asked:
                    is_asked = client.drain_replica(places[0]) > 0
        assert len(places) == 2 and places[0] != places[1], places

        def num_fetched_tokens() -> int:
            caches = {replica.replica_id: replica.cache for replica in ready_replicas(client)}
            now, then = caches.get(places[1]), before[places[1]]
            return now.num_store_hit_tokens - then.num_store_hit_tokens if now else 0

        wait_until(lambda: num_fetched_tokens() > NUM_PROMPT_TOKENS / 2, SLACK_S, "it read them")
        expected = client.generate(token_ids=prompt, sampling=sampling, timeout_s=60)
    assert tuple(tokens) == expected.token_ids


def test_upgrade_to_another_model_mixes_no_answers(
    cluster: ServingCluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The last one of this file: the cluster is another one afterwards."""
    plain = cluster.config.model_dump()
    folder = tmp_path_factory.mktemp("other") / "model"
    make_other_model(cluster.config.model.folder, folder)
    plain["model"] |= {"path": str(folder), "name": cluster.config.model.served_name}
    asks = ask_mix(NUM_STREAMS)
    with Client(cluster.address) as client:
        wait_for_order(client, without=set())
    with Streams(cluster.address, asks) as streams:
        streams.wait_for_round(ROUND_S)
        Upgrade(cluster.config.gateway.port).run(build(plain))
        streams.wait_for_round(ROUND_S)
    others = undisturbed(cluster.address, asks)
    mixed = [(index, got) for index, got in streams.verdict.wrong if got != others[index]]
    assert not mixed, f"{len(mixed)} answers are of neither model: {mixed[:3]}"
    assert streams.verdict.num_exact >= NUM_STREAMS, "of the model before"
    assert len(streams.verdict.wrong) >= NUM_STREAMS, "of the model after"
    for error in streams.verdict.errors:
        assert "FAILED_PRECONDITION" in error and "another version of the model" in error
    assert len(streams.verdict.errors) <= NUM_STREAMS, "each stream at most once"


def make_other_model(source: Path, target: Path) -> None:
    """Copy a model, and have it say something else."""
    shutil.copytree(source, target)
    (path,) = target.glob("*.safetensors")
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("down_proj.weight"):
            tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
