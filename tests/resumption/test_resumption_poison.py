"""A request that kills whoever computes it is stopped; the streams beside it are not."""

from __future__ import annotations

import pytest

from cluster.bench.resumption_cluster import Layout, ResumptionCluster
from cluster.bench.resumption_nursery import Nursery
from cluster.client import AsyncClient
from cluster.errors import PoisonError
from tests.resumption.resumption_executors import POISON
from tests.resumption.resumption_load import Load

pytestmark = pytest.mark.integration

LAYOUT = Layout(
    num_leaders=4,
    overrides=("model.dtype=float32",),
    executor="tests.resumption.resumption_executors:PoisonableExecutor",
)
NUM_STREAMS = 9


async def ask_poison(client: AsyncClient) -> None:
    prompt = (*POISON, *range(20))
    with pytest.raises(PoisonError):
        await client.generate(token_ids=prompt, sampling={"max_tokens": 4}, timeout_s=20)


async def test_poison_fails_after_two_replicas(nursery: Nursery) -> None:
    async with (
        ResumptionCluster(LAYOUT, nursery) as cluster,
        AsyncClient(cluster.addresses) as client,
    ):
        await ask_poison(client)
        assert len(cluster.bury()) == 2
        await cluster.restore()
        assert await client.generate("x", sampling={"max_tokens": 1, "ignore_eos": True})


async def test_neighbours_of_poison_finish_exactly(nursery: Nursery) -> None:
    async with (
        ResumptionCluster(LAYOUT, nursery) as cluster,
        AsyncClient(cluster.addresses) as client,
    ):
        load = Load(client, NUM_STREAMS, 128)
        await load.learn()

        async def poison() -> None:
            await ask_poison(client)

        streams = await load.run(poison)
        load.check(streams)
        dead = cluster.bury()
        # A third one where neighbours of the first were at the second and had no token of it yet:
        # then the request is tried alone, so that none of them is taken for the culprit.
        assert len(dead) in (2, 3)
        assert any(stream.replica_ids[0] in dead for stream in streams), "it had neighbours"
