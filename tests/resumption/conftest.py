"""Clusters of real processes that are killed, without Ray; one nursery forks all their members."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from cluster.bench.resumption import Kind, ResumptionBench, Sweep
from cluster.bench.resumption_cluster import ResumptionCluster
from cluster.bench.resumption_nursery import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """What has imported all that a leader or a gateway needs."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["replica", "gateway"])
async def sweep(request: pytest.FixtureRequest, nursery: Nursery) -> AsyncIterator[Sweep]:
    """What cuts streams, of either kind."""
    kind: Kind = request.param
    async with ResumptionCluster(ResumptionBench(kind=kind).layout, nursery) as cluster:
        yield Sweep(cluster, kind)
