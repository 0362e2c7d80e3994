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
NUM_STREAMS = 200
NUM_TOKENS = 64
MIN_STEP_S = 0.05  # no stream ends by itself between a signal and what follows it


async def test_drained_replica_hands_its_streams_over_and_is_gone(nursery: Nursery) -> None:
    overrides = (
        FLOAT32,
        f"replica.drain_timeout_s={DRAIN_TIMEOUT_S:g}",
        f"engine.max_num_seqs={NUM_STREAMS}",  # all run at once, wherever
    )
    layout = Layout(num_leaders=2, overrides=overrides, min_step_s=MIN_STEP_S)
    async with (
        ResumptionCluster(layout, nursery) as cluster,
        AsyncClient(cluster.addresses) as client,
    ):
        load = Load(client, NUM_STREAMS, NUM_TOKENS)
        await load.learn()
        drained = next(iter(cluster.leaders.values()))
        num_left, asked_s = 0, 0.0

        async def drain() -> None:
            nonlocal num_left, asked_s
            asked_s = time.monotonic()
            num_left = await client.drain_replica(drained.name)

        streams = await load.run(drain)
        load.check(streams)
        assert num_left > NUM_STREAMS / 4, "it had its share"
        moved = [stream for stream in streams if len(stream.replica_ids) > 1]
        # On a machine that stands still for seconds some may have ended before their turn came.
        assert num_left / 4 < len(moved) <= num_left, "what it had went elsewhere, and nothing else"
        assert {stream.replica_ids[0] for stream in moved} == {drained.name}
        await drained.wait_gone(max(0.0, asked_s + DRAIN_TIMEOUT_S - time.monotonic()))
        assert cluster.bury() == [drained.name]
        await cluster.wait_connected()


async def test_drained_gateway_sends_its_streams_to_the_other_one(nursery: Nursery) -> None:
    overrides = (FLOAT32, "gateway.drain_timeout_s=0.2")
    layout = Layout(num_leaders=2, num_gateways=2, overrides=overrides, min_step_s=MIN_STEP_S)
    async with (
        ResumptionCluster(layout, nursery) as cluster,
        AsyncClient(cluster.addresses) as client,
    ):
        load = Load(client, NUM_STREAMS // 20, NUM_TOKENS, resume_timeout_s=10.0)
        await load.learn()
        drained = cluster.gateways[cluster.addresses[0]]

        async def drain() -> None:
            await asyncio.to_thread(drained.process.terminate)

        streams = await load.run(drain)
        load.check(streams)
        num_cut = sum(stream.cut_index is not None for stream in streams)
        assert num_cut > len(streams) / 2, "it had all of them, and hardly one had ended"
        await drained.wait_gone(DRAIN_TIMEOUT_S)
