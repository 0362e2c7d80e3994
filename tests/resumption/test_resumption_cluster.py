"""The cluster that is killed here: what starts, what is replaced, what does not outlive it."""

from __future__ import annotations

import psutil
import pytest

from cluster.bench.resumption_cluster import Layout, ResumptionCluster
from cluster.bench.resumption_nursery import Nursery
from cluster.errors import UnavailableError

pytestmark = pytest.mark.integration

END_TIMEOUT_S = 10.0


async def test_cluster_replaces_what_was_killed_and_leaves_nothing(nursery: Nursery) -> None:
    async with ResumptionCluster(Layout(num_leaders=2, num_gateways=2), nursery) as cluster:
        leader = next(iter(cluster.leaders.values()))
        gateway = cluster.gateways[cluster.addresses[0]]
        cluster.kill_leader(leader.name)
        cluster.kill_gateway(gateway.address)
        await leader.wait_gone(END_TIMEOUT_S)
        await gateway.wait_gone(END_TIMEOUT_S)
        await cluster.restore()
        assert len(cluster.leaders) == len(cluster.gateways) == 2
        assert leader.name not in cluster.leaders and gateway.address not in cluster.addresses
        for address in cluster.addresses:
            assert await cluster.ready_at(address) == set(cluster.leaders)
        members = [*cluster.leaders.values(), *cluster.gateways.values()]
        assert all(member.process.is_running() for member in members)
    assert not any(member.process.is_running() for member in members)


async def test_member_that_does_not_start_is_told_of(nursery: Nursery) -> None:
    layout = Layout(num_leaders=1, executor="tests.resumption.nowhere:Executor")
    with pytest.raises(UnavailableError, match=r"leader-\d+ did not start: ModuleNotFoundError"):
        async with ResumptionCluster(layout, nursery):
            pass
    async with ResumptionCluster(Layout(num_leaders=1), nursery) as cluster:
        assert len(cluster.leaders) == 1, "the nursery goes on"


async def test_members_end_with_their_nursery() -> None:
    nursery = Nursery()
    async with ResumptionCluster(Layout(num_leaders=1), nursery) as cluster:
        members = [*cluster.leaders.values(), *cluster.gateways.values()]
        nursery.close()
        for member in members:
            await member.wait_gone(END_TIMEOUT_S)
    assert not any(psutil.pid_exists(member.process.pid) for member in members)
