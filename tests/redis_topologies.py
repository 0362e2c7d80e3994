"""A real Redis Cluster and a real Sentinel, for tests."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from redis_server import RedisServer, free_port

START_TIMEOUT_S = 30.0
NUM_SLOTS = 16384


def client_of(server: RedisServer) -> redis.Redis:
    return redis.Redis(port=server.port, protocol=2)


@contextlib.contextmanager
def redis_cluster(num_nodes: int = 3) -> Iterator[list[RedisServer]]:
    """Start masters that share all slots evenly; end them at the end."""
    with contextlib.ExitStack() as stack:
        nodes, bus_ports = [], []
        for _ in range(num_nodes):
            bus_ports.append(free_port())
            options = ("--cluster-enabled", "yes", "--cluster-port", str(bus_ports[-1]))
            nodes.append(stack.enter_context(RedisServer(options)))
        clients = [stack.enter_context(client_of(node)) for node in nodes]
        for index, client in enumerate(clients):
            first, after = (NUM_SLOTS * i // num_nodes for i in (index, index + 1))
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, after - 1)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", index + 1)
            client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port, bus_ports[0])
        _wait_until(
            lambda: all(
                client.execute_command("CLUSTER INFO")["cluster_state"] == "ok"
                and len(client.execute_command("CLUSTER SLOTS")) == num_nodes
                for client in clients
            )
        )
        yield nodes


def cluster_url(nodes: list[RedisServer]) -> str:
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


class RedisSentinel:
    """One sentinel of one service `main`; a context manager that ends it.

    Args:
        master: Running; the sentinel finds its replicas by itself.
    """

    def __init__(self, master: RedisServer) -> None:
        self._master = master
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.port}/main"

    def __enter__(self) -> RedisSentinel:
        self._folder = tempfile.TemporaryDirectory(prefix="sluice-sentinel-")
        self.port = free_port()
        config = Path(self._folder.name) / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self._folder.name}\n"
            f"logfile {self._folder.name}/sentinel.log\n"
            f"sentinel monitor main 127.0.0.1 {self._master.port} 1\n"
            "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 2000\n"
        )
        self._process = subprocess.Popen(["redis-server", str(config), "--sentinel"])
        self._client = redis.Redis(port=self.port, protocol=2)
        try:
            _wait_until(lambda: self._row() is not None)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def wait_for_replica(self) -> None:
        """Return when the sentinel knows a replica that it can promote."""
        _wait_until(
            lambda: any(
                row["master-link-status"] == "ok" for row in self._client.sentinel_slaves("main")
            )
        )

    def _row(self) -> object:
        with contextlib.suppress(redis.ConnectionError):
            return self._client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", "main")
        return None


def _wait_until(is_done: object) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not is_done():  # type: ignore[operator]
        if time.monotonic() > deadline_s:
            raise RuntimeError("Redis did not get ready in time")
        time.sleep(0.05)
