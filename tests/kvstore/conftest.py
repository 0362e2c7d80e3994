"""One fixture that opens stores of each kind, for the contract that all of them keep."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

import pytest
from kvstore_kinds import Kind

from cluster.clock import VirtualClock
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.open import open_store


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
        request.getfixturevalue("ray_cluster")
        kind = Kind("actor", open_store, asyncio.sleep)
    yield kind
    for namespace, store in kind.opened.items():
        await store.close()
        if isinstance(store, EmbeddedStore):
            store.check_invariants()
        if kind.name == "actor":
            from cluster.kvstore.embedded_actor import delete_actor

            delete_actor(namespace)
