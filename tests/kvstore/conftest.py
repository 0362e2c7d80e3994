"""One fixture that opens stores of each kind, for the contract that all of them keep."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from kvstore_kinds import Kind, fresh_namespace

from cluster.clock import VirtualClock, WallClock
from cluster.config import StoreConfig
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.open import open_store
from cluster.kvstore.store import Store


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


def _actor_kind(actors: list[Any]) -> Kind:
    import ray

    from cluster.kvstore.embedded_actor import EmbeddedStoreClient

    unused = iter(actors)

    def make(config: StoreConfig) -> Store:
        actor = next(unused)
        begun_anew = actor.__ray_call__.remote(EmbeddedStore.__init__, config, WallClock())
        ray.get(begun_anew, timeout=60.0)
        return EmbeddedStoreClient(actor, config.timeout_s)

    return Kind("actor", make, asyncio.sleep)


@pytest.fixture(
    params=[
        "embedded",
        pytest.param("redis", marks=pytest.mark.integration),
        pytest.param("actor", marks=pytest.mark.integration),
    ]
)
async def kind(request: pytest.FixtureRequest) -> AsyncIterator[Kind]:
    if request.param == "embedded":
        clock = VirtualClock()

        async def elapse(delta_s: float) -> None:
            clock.advance(delta_s)

        kind = Kind("embedded", lambda config: EmbeddedStore(config, clock), elapse)
    elif request.param == "redis":
        server = request.getfixturevalue("redis_server")
        kind = Kind("redis", open_store, asyncio.sleep, server.url)
    else:
        kind = _actor_kind(request.getfixturevalue("store_actors"))
    yield kind
    for store in kind.opened:
        await store.close()
        if isinstance(store, EmbeddedStore):
            store.check_invariants()
