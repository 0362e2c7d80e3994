"""The cluster of `sluice bench chaos`, on this machine with a Redis of its own, and how it stands.

             ClientNetwork
clients ──► path, path ──► one port, several gateways ──► replicas
the benchmark ───────────►       │ directly: what it watches is not what it disturbs
                                 └──► Redis
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from redis import Redis

from cluster.bench.chaos_leaks import Inventory
from cluster.bench.chaos_plan import ChaosPlan
from cluster.bench.chaos_processes import Family, ProcessSample, count_kinds
from cluster.bench.chaos_schedule import Standing
from cluster.bench.chaos_shared import SharedFiles
from cluster.bench.store_redis import OwnRedis, free_port
from cluster.client import AsyncClient, ClusterState
from cluster.config import ClusterConfig, load_config
from cluster.errors import SluiceError, UnavailableError
from cluster.gateway.app import ServingCluster, check, start
from cluster.gateway.fleet import GATEWAY_LEASES
from cluster.kvstore.open import open_store
from cluster.kvstore.store import Store

STATUS_TIMEOUT_S = 2.0
END_TIMEOUT_S = 10.0
_NUM_TRIES = 40  # to meet every gateway behind the one port
_MIB = 2**20

# The model's answers do not depend on who else is in a batch in float32 alone. Small budgets are
# full soon, so that what grows behind them is a leak.
_SETTINGS = (
    "model.dtype=float32",
    "parallel.num_cpus_per_worker=0.1",
    "parallel.threads_per_worker=1",
    f"cache.host_memory_bytes={4 * _MIB}",
    f"store.max_bytes={32 * _MIB}",
    f"store.journal_bytes={8 * _MIB}",
    "store.kv_write_after_uses=1",
    "replica.drain_timeout_s=10",
    "gateway.drain_timeout_s=10",
)


def chaos_config(plan: ChaosPlan, redis_url: str, overrides: list[str]) -> ClusterConfig:
    """Return the configuration of the cluster.

    Args:
        plan: What is to be done to it.
        redis_url: Of its store.
        overrides: As of `--set`, above all that.

    Raises:
        ConfigError: As `load_config`.
    """
    own = {
        "replica.num_replicas": plan.num_replicas,
        "parallel.tp": plan.num_workers,
        "gateway.num_replicas": plan.num_gateways,
        "gateway.port": free_port(),
        "cache.num_blocks": plan.num_blocks,
        "store.namespace": f"sluice-chaos-{os.getpid()}",
    }
    settings = [f"{name}={value}" for name, value in own.items()]
    return load_config(None, [*_SETTINGS, *settings, *overrides, f"store.url={redis_url}"])


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the cluster has shown."""

    standing: Standing
    leader_pids: dict[str, int]  # by replica that takes requests
    gateway_pids: dict[str, int]  # by gateway that serves


class ChaosCluster:
    """A cluster that is disturbed.

    Args:
        config: That it runs with.
        redis: Its store.
        family: Its processes.
        shared: Its files in shared memory.
        serving: The cluster itself.
    """

    def __init__(
        self,
        config: ClusterConfig,
        redis: OwnRedis,
        family: Family,
        shared: SharedFiles,
        serving: ServingCluster,
    ) -> None:
        self.config = config
        self.redis = redis
        self.family = family
        self.address = serving.address
        self.left: list[str] = []  # what did not end with it, in words
        self._shared = shared
        self._leases: dict[str, int] = {}  # pid by id, as far as known

    @property
    def budget_bytes(self) -> int:
        """What the store may hold."""
        return self.config.store.max_bytes + self.config.store.journal_bytes

    def open_store(self) -> Store:
        """Return a connection to the store; the caller closes it."""
        return open_store(self.config.store)

    async def look(self, store: Store) -> Look:
        """Return who serves; of what does not answer, what was known before or nothing."""
        with contextlib.suppress(SluiceError):
            leases = await store.list_leases(GATEWAY_LEASES)
            self._leases = {name: json.loads(value)["pid"] for name, value in leases.items()}
        gateways = {name: pid for name, pid in self._leases.items() if self.family.has(pid)}
        leaders: dict[str, int] = {}
        with contextlib.suppress(SluiceError):
            state = await self.status()
            for replica in state.replicas:
                if replica.state == "ready" and self.family.has(replica.leader_pid):
                    leaders[replica.replica_id] = replica.leader_pid
        standing = Standing(
            tuple(sorted(leaders)),
            tuple(sorted(gateways)),
            self.config.replica.num_replicas,
            self.config.gateway.num_replicas,
        )
        return Look(standing, leaders, gateways)

    async def status(self) -> ClusterState:
        """Return the cluster as one of the gateways sees it; each call may meet another.

        Raises:
            SluiceError: None answers.
        """
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S), AsyncClient(self.address) as client:
                return await client.status()
        except TimeoutError as error:
            raise UnavailableError(f"no status within {STATUS_TIMEOUT_S:g} s") from error

    async def statuses(self) -> list[ClusterState]:
        """Return the cluster as each gateway sees it that could be met."""
        found: dict[str, ClusterState] = {}
        for _ in range(_NUM_TRIES):
            with contextlib.suppress(SluiceError):
                state = await self.status()
                found[state.gateway_id] = state
            if len(found) >= self.config.gateway.num_replicas:
                break
        return [state for _, state in sorted(found.items())]

    def sample(self) -> list[ProcessSample]:
        """Return its processes, oldest first; also notes what they have in shared memory."""
        samples = self.family.sample()
        self._shared.note()
        return samples

    def inventory(self) -> Inventory:
        """Return what there is of the cluster now; takes a good part of a second."""
        samples = self.sample()
        connection = Redis.from_url(self.redis.url)
        try:
            used_bytes = int(connection.info("memory")["used_memory"])
        finally:
            connection.close()
        return Inventory(
            count_kinds(samples),
            self.family.num_ports(),
            self._shared.names(),
            used_bytes,
        )


@contextlib.contextmanager
def running_cluster(
    make_config: Callable[[str], ClusterConfig], tell: Callable[[str], None]
) -> Iterator[ChaosCluster]:
    """Run a cluster, and end it with everything that it started.

    Args:
        make_config: Gets the URL of its Redis.
        tell: Told what is being done.

    Raises:
        ConfigError: The configuration cannot work, or there is no redis-server.
        UnavailableError: It did not come up.
    """
    family = Family()
    shared = SharedFiles(family.shared_names)
    redis = OwnRedis(niceness=0)
    cluster: ChaosCluster | None = None
    try:
        config = make_config(redis.url)
        check(config)
        with start(config, on_progress=tell) as serving:
            family.sample()
            cluster = ChaosCluster(config, redis, family, shared, serving)
            yield cluster
    finally:
        redis.close()
        left = [f"{name} did not end with the cluster" for name in family.end_rest(END_TIMEOUT_S)]
        if cluster is not None:
            cluster.left = [*left, *(f"{n} is still in shared memory" for n in shared.names())]
