"""Which leases a gateway makes connections of."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from prefix_fakes import replica_info

from cluster.clock import VirtualClock
from cluster.config import ClusterConfig, StoreConfig
from cluster.gateway.fleet import Fleet
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.registry import Registry
from cluster.router.dispatcher import Dispatcher

pytestmark = pytest.mark.integration

TTL_S = 60.0


@pytest.fixture
def store() -> EmbeddedStore:
    return EmbeddedStore(StoreConfig(), VirtualClock())


@pytest.fixture
async def fleet(store: EmbeddedStore) -> AsyncIterator[Fleet]:
    config = ClusterConfig()
    fleet = Fleet(config.replica, store, Dispatcher(config, rng=random.Random(0)))
    yield fleet
    await fleet.stop()


def _ids(fleet: Fleet) -> list[str]:
    return [link.info.replica_id for link in fleet.links]


async def test_lease_that_cannot_be_true_is_left_out_and_counted_once(
    fleet: Fleet, store: EmbeddedStore, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = replica_info("good", address="127.0.0.1:1"), replica_info("bad", block_size=0)
    registry = Registry(store)
    for info in (good, bad):
        await registry.register(info, TTL_S)
    for _ in range(3):
        await fleet._reconcile()
    assert _ids(fleet) == ["good"]
    assert fleet.watch_counts.num_quarantines == 1
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert told == [
        "replica 'bad' is left out, its lease says block_size=0, limit=1 to 65536",
    ]
    await registry.register(replace(bad, block_size=16, address="127.0.0.1:1"), TTL_S)
    await fleet._reconcile()
    assert _ids(fleet) == ["bad", "good"]


async def test_lease_that_comes_back_with_nonsense_is_counted_again(
    fleet: Fleet, store: EmbeddedStore
) -> None:
    registry, bad = Registry(store), replica_info("bad", fingerprint="no hex")
    for _ in range(2):
        await registry.register(bad, TTL_S)
        await fleet._reconcile()
        await registry.unregister("bad")
        await fleet._reconcile()
        assert not fleet._quarantined, "ids of replicas that are gone are forgotten"
    assert fleet.watch_counts.num_quarantines == 2
