"""Drained replicas and gateways leave; the streams that they carried do not notice."""

from __future__ import annotations

import asyncio
import time

import pytest

from cluster.bench.resumption_cluster import Layout, ResumptionCluster
from cluster.bench.resumption_nursery import Nursery
from cluster.client import AsyncClient
from tests.resumption.resumption_load import Load

pytestmark = pytest.mark.integration

FLOAT32 = "model.dtype=float32"
DRAIN_TIMEOUT_S = 10.0
NUM_STREAMS = 20
NUM_TOKENS = 64


async def test_drained_replica_hands_its_streams_over_and_is_gone(nursery: Nursery) -> None:
    overrides = (FLOAT32, f"replica.drain_timeout_s={DRAIN_TIMEOUT_S:g}")
    layout = Layout(num_leaders=2, overrides=overrides)
    async with (
        ResumptionCluster(layout, nursery) as cluster,
        AsyncClient(cluster.addresses) as client,
    ):
        load = Load(client, NUM_STREAMS, NUM_TOKENS)
        await load.learn()
        drained = next(iter(cluster.leaders.values()))
        num_left: list[int] = []

        async def drain() -> None:
            num_left.append(await client.drain_replica(drained.name))

        began_s = time.monotonic()
        streams = await load.run(drain)
        load.check(streams)
        assert num_left[0] > 0, "it had something to hand over"
        moved = [stream for stream in streams if len(stream.replica_ids) > 1]
        assert len(moved) == num_left[0], "all of it went elsewhere, and nothing else did"
        assert {stream.replica_ids[0] for stream in moved} == {drained.name}
        await drained.wait_gone(began_s + DRAIN_TIMEOUT_S - time.monotonic())
        assert cluster.bury() == [drained.name]
        await cluster.wait_connected()


async def test_drained_gateway_sends_its_streams_to_the_other_one(nursery: Nursery) -> None:
    overrides = (FLOAT32, "gateway.drain_timeout_s=0.2")
    layout = Layout(num_leaders=2, num_gateways=2, overrides=overrides)
    async with (
        ResumptionCluster(layout, nursery) as cluster,
        AsyncClient(cluster.addresses) as client,
    ):
        load = Load(client, NUM_STREAMS // 2, NUM_TOKENS, resume_timeout_s=10.0)
        await load.learn()
        drained = cluster.gateways[cluster.addresses[0]]

        async def drain() -> None:
            await asyncio.to_thread(drained.process.terminate)

        streams = await load.run(drain)
        load.check(streams)
        assert all(stream.cut_index is not None for stream in streams), "it had all of them"
        await drained.wait_gone(DRAIN_TIMEOUT_S)
