from __future__ import annotations

import json
import logging

import pytest

from cluster.clock import VirtualClock
from cluster.config import StoreConfig
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.registry import REPLICA_LEASES, Registry
from cluster.types import ReplicaInfo


def info_of(replica_id: str) -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=replica_id,
        address="127.0.0.1:4711",
        model="demo",
        fingerprint="ab12",
        tp=2,
        pp=1,
        block_size=16,
        max_model_len=512,
        pid=77,
        node_id="nöde",
    )


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def store(clock: VirtualClock) -> EmbeddedStore:
    return EmbeddedStore(StoreConfig.model_validate({}), clock)


async def test_registry_lists_who_is_registered_by_id(store: EmbeddedStore) -> None:
    registry = Registry(store)
    assert await registry.list() == []
    await registry.register(info_of("b"), 5.0)
    await registry.register(info_of("a"), 5.0)
    assert await Registry(store).list() == [info_of("a"), info_of("b")]
    await registry.unregister("b")
    await registry.unregister("b")
    assert await registry.list() == [info_of("a")]


async def test_registry_forgets_who_does_not_renew(
    store: EmbeddedStore, clock: VirtualClock
) -> None:
    registry = Registry(store)
    await registry.register(info_of("a"), 5.0)
    await registry.register(info_of("b"), 5.0)
    clock.advance(4.0)
    await registry.register(info_of("a"), 5.0)
    clock.advance(2.0)
    assert await registry.list() == [info_of("a")]


def _entry(**changes: object) -> bytes:
    entry = {"version": 1, "replica": {**_fields("bad"), **changes}}
    return json.dumps(entry).encode()


def _fields(replica_id: str) -> dict[str, object]:
    info = info_of(replica_id)
    return {name: getattr(info, name) for name in ReplicaInfo.__slots__}


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"version": 1}',
        json.dumps({"version": 2, "replica": _fields("bad")}).encode(),
        json.dumps({"version": 1, "replica": {"replica_id": "bad"}}).encode(),
        _entry(tp="2"),
        _entry(address=None),
    ],
)
async def test_registry_leaves_out_what_it_cannot_read_and_says_so_once(
    store: EmbeddedStore, caplog: pytest.LogCaptureFixture, value: bytes
) -> None:
    registry = Registry(store)
    await registry.register(info_of("good"), 5.0)
    await store.put_lease(REPLICA_LEASES, "bad", value, 5.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await registry.list() == [info_of("good")]
    (record,) = caplog.records
    assert "replica bad left out" in record.getMessage()


async def test_registry_reads_entries_with_fields_that_it_does_not_know(
    store: EmbeddedStore,
) -> None:
    await store.put_lease(REPLICA_LEASES, "bad", _entry(zone="added in a later release"), 5.0)
    assert await Registry(store).list() == [info_of("bad")]
