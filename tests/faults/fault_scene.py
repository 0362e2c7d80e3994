"""A cluster with tenants, the proxy before its Redis, and that Redis: where faults take place."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import redis
import yaml
from fault_cluster import (
    NUM_PREFIXES,
    REQUEST_TIMEOUT_S,
    cluster_config,
    expected_answers,
    prompt_mix,
)
from fault_proxy import FaultProxy
from redis_server import RedisServer
from waiting import wait_until

from cluster.client import CacheLoad, Client
from cluster.gateway.app import ServingCluster, check, start
from cluster.types import StoreState

KEYS = {name: f"sk-{name}-0123456789abcdef" for name in ("alice", "bob", "carol", "root")}
_ROLES: dict[str, dict[str, object]] = {
    "alice": {"group": "research"},
    "bob": {"group": "research"},
    "root": {"admin": True},
}
RECOVERY_S = 5.0
HITS_S = 10.0  # blocks may have to be written first


class Scene:
    """What a test of this room disturbs and asks."""

    def __init__(self, server: RedisServer, proxy: FaultProxy, cluster: ServingCluster) -> None:
        self.server = server
        self.proxy = proxy
        self.address = cluster.address
        self.client = self.client_of("root")

    def client_of(self, tenant: str) -> Client:
        """Return a client of a tenant: alice and bob share, carol is alone, root administers."""
        return Client(self.address, api_key=KEYS[tenant])

    def redis(self, password: str | None = None) -> redis.Redis:
        """Return a connection around the proxy; new, for the server may be."""
        return redis.Redis(port=self.server.port, password=password)

    def caches(self) -> list[CacheLoad]:
        """Return the tiers of each replica."""
        return [replica.cache for replica in self.client.status().replicas]

    def total(self, counter: str) -> int:
        """Return a counter of `CacheLoad`, the sum of all replicas."""
        return sum(getattr(load, counter) for load in self.caches())

    def flush_replicas(self) -> None:
        """Have all replicas forget what no request uses."""
        assert not self.client.flush_cache(replicas=True).failed_replica_ids

    def wait_for_order(self) -> float:
        """Wait until every replica says that its store does well."""
        return wait_until(
            lambda: {load.store_state for load in self.caches()} == {StoreState.EXACT},
            RECOVERY_S,
            "the store is in order",
        )

    def wait_for_hits(self) -> float:
        """Wait until most shared prefixes come from the store: on a busy machine some are late."""
        return wait_until(
            lambda: self._num_store_hits() > NUM_PREFIXES // 2, HITS_S, "blocks come from the store"
        )

    def _num_store_hits(self) -> int:
        """Return how many shared prefixes replicas that have nothing take from the store."""
        self.flush_replicas()
        num_hits = 0
        for index, ask in enumerate(prompt_mix()[:NUM_PREFIXES]):
            done = self.client.generate(
                token_ids=ask.prompt, sampling=ask.sampling, timeout_s=REQUEST_TIMEOUT_S
            )
            assert done.token_ids == expected_answers()[index]
            num_hits += 2 * done.usage.cached_tokens > len(ask.prompt)
        return num_hits

    def change_values(self, change: Callable[[bytes, bytes], bytes]) -> None:
        """Write something else in the place of each stored block; `change` gets key and frame."""
        there = self.redis()
        num_changed = 0
        for name in there.scan_iter(match="*:block:*", count=1000):
            key = name.split(b":block:", 1)[1]
            frame = there.get(name)
            if isinstance(frame, bytes):
                there.set(name, change(key, frame), keepttl=True)
                num_changed += 1
        assert num_changed, "nothing was stored"

    def leader_pids(self) -> list[int]:
        """Return the process of each replica's leader that can be asked, by replica."""
        return [r.leader_pid for r in self.client.status().replicas if r.state == "ready"]


def movers_of(leader_pid: int) -> list[psutil.Process]:
    """Return the processes that move a replica's blocks."""
    children = psutil.Process(leader_pid).children()
    living = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if "cluster.replica.mover_start" in child.cmdline()]


def mover_of(leader_pid: int) -> psutil.Process:
    """Return the process that moves a replica's blocks; there is one."""
    (mover,) = movers_of(leader_pid)
    return mover


def _tenants() -> list[dict[str, object]]:
    digests = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    return [
        {"name": name, "key_sha256": [digest], **_ROLES.get(name, {})}
        for name, digest in digests.items()
    ]


@contextlib.contextmanager
def running_scene(folder: Path) -> Iterator[Scene]:
    """Run a cluster of two groups whose store is behind the proxy.

    Args:
        folder: For its files.
    """
    with RedisServer() as server, FaultProxy(server.port) as proxy:
        tenants = folder / "tenants.yaml"
        tenants.write_text(yaml.safe_dump({"tenants": _tenants()}))
        config = cluster_config(proxy.url, f"faults{os.getpid()}", f"auth.tenants_file={tenants}")
        check(config)
        with start(config) as cluster:
            scene = Scene(server, proxy, cluster)
            yield scene
            scene.client.close()
