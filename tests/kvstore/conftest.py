"""One fixture that opens stores of each kind, for the contracts that all of them keep."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from kvstore_kinds import Kind, fresh_namespace
from redis_server import RedisServer
from redis_topologies import RedisSentinel, cluster_url, redis_cluster

from cluster.clock import VirtualClock
from cluster.config import StoreConfig
from cluster.kvstore.block_store import BlockStore
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.embedded_blocks import EmbeddedBlocks
from cluster.kvstore.open import open_block_store, open_store
from cluster.kvstore.store import Store


@pytest.fixture(scope="session")
def cluster_nodes(redis_server: RedisServer) -> Iterator[list[RedisServer]]:
    """A cluster of three for all tests; it needs what `redis_server` needs, and skips with it."""
    with redis_cluster() as nodes:
        yield nodes


@pytest.fixture(scope="session")
def sentinel(redis_server: RedisServer) -> Iterator[RedisSentinel]:
    """A sentinel of the session's server."""
    with RedisSentinel(redis_server) as sentinel:
        yield sentinel


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray of this module's own, with one CPU; gone at its end, since other rooms start theirs."""
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        namespace=f"test-{os.getpid()}",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def store_actors(ray_cluster: None) -> Iterator[list[Any]]:
    """Two store actors, started once: a test gets them as new, not new processes."""
    from cluster.kvstore.embedded_actor import delete_actor, get_or_create_actor

    configs = [StoreConfig.model_validate({"namespace": fresh_namespace()}) for _ in range(2)]
    yield [get_or_create_actor(config) for config in configs]
    for config in configs:
        delete_actor(config.namespace)


def _embedded_kind() -> Kind:
    clock = VirtualClock()

    async def elapse(delta_s: float) -> None:
        clock.advance(delta_s)

    return Kind(
        "embedded",
        lambda config: EmbeddedStore(config, clock),
        lambda config: EmbeddedBlocks(config, clock),
        elapse,
    )


def _actor_kind(actors: list[Any]) -> Kind:
    import ray

    from cluster.kvstore.embedded_actor import (
        EmbeddedBlocksClient,
        EmbeddedHome,
        EmbeddedStoreClient,
    )

    unused = iter(actors)

    def begun_anew(config: StoreConfig) -> Any:
        actor = next(unused)
        ray.get(actor.__ray_call__.remote(EmbeddedHome.__init__, config), timeout=60.0)
        return actor

    return Kind(
        "actor",
        lambda config: EmbeddedStoreClient(begun_anew(config), config.timeout_s),
        lambda config: EmbeddedBlocksClient(begun_anew(config), config.timeout_s),
        asyncio.sleep,
    )


def _redis_blocks(config: StoreConfig) -> BlockStore:
    blocks = open_block_store(config)
    assert blocks is not None
    return blocks


def _redis_kind(name: str, url: str, num_shards: int = 1) -> Kind:
    def make(config: StoreConfig) -> Store:
        return open_store(config)

    return Kind(name, make, _redis_blocks, asyncio.sleep, url, num_shards)


def _kind(name: str, request: pytest.FixtureRequest) -> Kind:
    if name == "embedded":
        return _embedded_kind()
    if name == "actor":
        return _actor_kind(request.getfixturevalue("store_actors"))
    if name == "cluster":
        url = cluster_url(request.getfixturevalue("cluster_nodes"))
        return _redis_kind(name, url, num_shards=16)
    if name == "sentinel":
        return _redis_kind(name, request.getfixturevalue("sentinel").url)
    return _redis_kind(name, request.getfixturevalue("redis_server").url)


@pytest.fixture(
    params=["embedded"]
    + [
        pytest.param(name, marks=pytest.mark.integration)
        for name in ("redis", "cluster", "sentinel", "actor")
    ]
)
async def kind(request: pytest.FixtureRequest) -> AsyncIterator[Kind]:
    kind = _kind(request.param, request)
    yield kind
    for store in kind.opened:
        await store.close()
        if isinstance(store, EmbeddedStore | EmbeddedBlocks):
            store.check_invariants()
