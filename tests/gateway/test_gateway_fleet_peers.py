"""A gateway's place among the gateways, read from the leases in the store."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from gateway_fakes import eventually, stage

from cluster.clock import VirtualClock
from cluster.config import ClusterConfig, StoreConfig
from cluster.errors import UnavailableError
from cluster.gateway.fleet import GATEWAY_LEASES, Fleet
from cluster.kvstore.embedded import EmbeddedStore
from cluster.router.dispatcher import Dispatcher

pytestmark = pytest.mark.integration

TTL_S = 10.0


class Peers(Dispatcher):
    """Keeps the places that it is told."""

    def __init__(self) -> None:
        super().__init__(ClusterConfig(), rng=random.Random(0))
        self.places: list[tuple[int, int]] = []

    def set_peers(self, rank: int, num_gateways: int) -> None:
        self.places.append((rank, num_gateways))
        super().set_peers(rank, num_gateways)


class Leases(EmbeddedStore):
    """Can be lost; counts how often it was asked who is there."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        super().__init__(StoreConfig(), clock=self.clock)
        self.is_lost = False
        self.num_asked = 0

    async def list_leases(self, kind: str) -> dict[str, bytes]:
        self.num_asked += 1
        if self.is_lost:
            raise UnavailableError("no answer")
        return await super().list_leases(kind)

    async def asked_anew(self) -> None:
        """Return once each of two fleets has looked since."""
        asked = self.num_asked
        await eventually(lambda: self.num_asked > asked + 8)


@asynccontextmanager
async def _fleets(store: Leases, gateway_ids: Sequence[str]) -> AsyncIterator[list[Peers]]:
    peers = [Peers() for _ in gateway_ids]
    fleets = [
        Fleet(ClusterConfig().replica, store, dispatcher, gateway_id=gateway_id)
        for gateway_id, dispatcher in zip(gateway_ids, peers, strict=True)
    ]
    for fleet in fleets:
        fleet.start()
    try:
        yield peers
    finally:
        for fleet in fleets:
            await fleet.stop()


async def test_place_follows_gateways_that_come_and_go(caplog: pytest.LogCaptureFixture) -> None:
    store = Leases()
    await store.put_lease(GATEWAY_LEASES, "b", b"", TTL_S)
    async with _fleets(store, ["a", "b"]) as (first, second):
        await eventually(lambda: second.places == [(0, 1)])
        await store.put_lease(GATEWAY_LEASES, "a", b"", TTL_S)
        await eventually(lambda: second.places == [(0, 1), (1, 2)])
        await eventually(lambda: first.places == [(0, 2)])
        await store.drop_lease(GATEWAY_LEASES, "a")
        await eventually(lambda: second.places == [(0, 1), (1, 2), (0, 1)])
        await store.asked_anew()
    assert first.places == [(0, 2)], "without a lease it has no other place"
    assert second.places == [(0, 1), (1, 2), (0, 1)], "told again though nothing had changed"
    assert not caplog.records


async def test_gateway_that_falls_silent_loses_its_place() -> None:
    store = Leases()
    await store.put_lease(GATEWAY_LEASES, "a", b"", TTL_S)
    await store.put_lease(GATEWAY_LEASES, "b", b"", 3 * TTL_S)
    async with _fleets(store, ["b"]) as (second,):
        await eventually(lambda: second.places == [(1, 2)])
        store.clock.advance(2 * TTL_S)
        await eventually(lambda: second.places == [(1, 2), (0, 1)])


async def test_place_stays_while_the_store_is_lost() -> None:
    store = Leases()
    for gateway_id in ("a", "b"):
        await store.put_lease(GATEWAY_LEASES, gateway_id, b"", TTL_S)
    async with _fleets(store, ["a", "b"]) as (first, second):
        await eventually(lambda: (first.places, second.places) == ([(0, 2)], [(1, 2)]))
        store.is_lost = True
        await store.drop_lease(GATEWAY_LEASES, "a")
        await store.asked_anew()
        assert second.places == [(1, 2)]
        store.is_lost = False
        await eventually(lambda: second.places == [(1, 2), (0, 1)])


async def test_gateway_looks_for_its_own_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage() as running:
        places: list[tuple[int, int]] = []
        monkeypatch.setattr(running.dispatcher, "set_peers", lambda *place: places.append(place))
        for gateway_id in ("gateway-0", "gateway-1"):
            await running.store.put_lease(GATEWAY_LEASES, gateway_id, b"", 3600)
        await eventually(lambda: places[-1:] == [(1, 2)])
