"""A cluster of two groups and two gateways, and the processes of it that a test may end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster
from redis_server import RedisServer, free_port
from waiting import wait_until

from cluster.client import Client, ReplicaState
from cluster.config import ClusterConfig, load_config
from cluster.errors import SluiceError
from cluster.gateway.app import APP_NAME, check, start

NUM_GROUPS = 2
NUM_GATEWAYS = 2
DRAIN_S = 10.0
REBUILD_S = 90.0  # a process that loads torch and the model, on a machine that does other things
NODE = {"num_cpus": 4, "include_dashboard": False}  # logical CPUs: one node has room for all

LEADER = "ServeReplica:sluice:replica-group"
GATEWAY = "ServeReplica:sluice:gateway"
CONTROLLER = "ray::ServeController"


def cluster_config(store_url: str, *more: str) -> ClusterConfig:
    """Return the configuration of two small groups behind two gateways on one port."""
    return load_config(
        None,
        [
            "model.dtype=float32",  # batches of every size give the same tokens
            "parallel.num_cpus_per_worker=0.1",
            f"replica.num_replicas={NUM_GROUPS}",
            f"replica.drain_timeout_s={DRAIN_S:g}",
            f"gateway.num_replicas={NUM_GATEWAYS}",
            f"gateway.drain_timeout_s={DRAIN_S:g}",
            f"gateway.port={free_port()}",
            "cache.num_blocks=600",
            f"store.url={store_url}",
            f"store.namespace=test{os.getpid()}",
            *more,
        ],
    )


def processes(title: str) -> list[psutil.Process]:
    """Return this test's processes whose title has something in it, the oldest first.

    Only descendants of this process are looked at: other Rays of the machine are none of ours.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()  # none: it has ended
            if words and title in words[0]:
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def is_there(process: psutil.Process) -> bool:
    """Return whether a process has not ended; one that nobody has asked for its status has."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ready_replicas(client: Client) -> list[ReplicaState]:
    """Return the replicas that take requests, as the first gateway that answers sees them."""
    try:
        return [replica for replica in client.status().replicas if replica.state == "ready"]
    except SluiceError:  # the gateway that was asked is going
        return []


def wait_for_order(client: Client, without: set[int]) -> float:
    """Wait until all groups are ready; return for how long, seconds.

    Args:
        client: To ask.
        without: Leaders, by process id, that must be gone.
    """

    def is_in_order() -> bool:
        pids = {replica.leader_pid for replica in ready_replicas(client)}
        return len(pids) == NUM_GROUPS and not pids & without

    return wait_until(is_in_order, REBUILD_S, "all groups are ready")


class Scene:
    """A cluster on a Ray of its own of two nodes, whose control plane keeps its state in Redis."""

    def __init__(self, nodes: Cluster, address: str) -> None:
        self.nodes = nodes
        self.address = address
        self.client = Client(address)

    @contextlib.contextmanager
    def no_control_plane(self) -> Iterator[None]:
        """Kill Ray's control plane; leaving starts it again."""
        self.nodes.head_node.kill_gcs_server()
        try:
            yield
        finally:  # without it this very process is ended by Ray after 60 s
            self.nodes.head_node.start_gcs_server()

    def check_healing(self) -> None:
        """Assert that Serve sees a leader's death and builds its group anew."""
        leader = ready_replicas(self.client)[0].leader_pid
        psutil.Process(leader).kill()
        wait_for_order(self.client, without={leader})
        self.wait_running()

    def wait_running(self) -> None:
        """Wait until Serve is content with what runs."""
        wait_until(
            lambda: serve.status().applications[APP_NAME].status == "RUNNING",
            REBUILD_S,
            "Serve says that it runs",
        )


@contextlib.contextmanager
def running_scene() -> Iterator[Scene]:
    """Run the cluster. Leaving ends its nodes by their own process ids, and no other Ray."""
    with RedisServer() as server:
        redis_address = f"127.0.0.1:{server.port}"
        # Ray wants the address of its tables and, once more, that of their only shard.
        head = {**NODE, "external_addresses": [redis_address, redis_address]}
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes.add_node(**NODE)
            config = cluster_config(server.url)
            check(config)
            with start(config, ray_address=nodes.address) as serving:
                yield Scene(nodes, serving.address)
        finally:
            ray.shutdown()
            nodes.shutdown()
