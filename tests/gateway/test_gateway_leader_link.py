"""A link to a leader whose watch goes wrong, over real gRPC."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from gateway_fakes import FakeLeader, eventually

from cluster.gateway.leader_link import LeaderLink, WatchCounts, watch_pause_s
from cluster.router.prefix_index import PrefixIndex
from cluster.router.replica_table import ReplicaTable
from cluster.rpc import convert
from cluster.rpc.sluice.internal.v1 import engine_pb2 as pb
from cluster.types import EngineRequest, ReplicaInfo, ReplicaLoad, SamplingParams

_GOOD = ReplicaLoad(num_blocks=100, num_free_blocks=100)
_NONSENSE = ReplicaLoad(num_blocks=100, num_free_blocks=100, late_s=math.nan)


class _Leader(FakeLeader):
    """One whose sessions can be ended."""

    sessions: list[asyncio.Task[None]]

    async def start(self) -> ReplicaInfo:
        self.sessions = []
        return await super().start()

    async def Session(self, commands: AsyncIterator[pb.SessionRequest], context: Any) -> None:
        task = asyncio.create_task(super().Session(commands, context))
        self.sessions.append(task)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the session was ended")


@dataclass(slots=True)
class _Linked:
    leader: FakeLeader
    link: LeaderLink
    table: ReplicaTable
    index: PrefixIndex
    counts: WatchCounts
    changes: list[bool]  # at each change, whether the replica was in the table

    @property
    def is_in(self) -> bool:
        return self.leader.replica_id in self.table

    def holds(self, *keys: int) -> bool:
        return self.index.longest_prefix(self.leader.replica_id, keys) == len(keys)


@asynccontextmanager
async def _linked(leader: FakeLeader) -> AsyncIterator[_Linked]:
    info = await leader.start()
    table, index, counts = ReplicaTable(), PrefixIndex(), WatchCounts()
    changes: list[bool] = []
    link = LeaderLink(
        info,
        table=table,
        index=index,
        silence_s=10.0,
        on_change=lambda: changes.append(info.replica_id in table),
        counts=counts,
    )
    try:
        yield _Linked(leader, link, table, index, counts, changes)
    finally:
        await link.stop()
        await leader.server.stop(None)


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([{"seq": 2, "added": [9]}], id="skips"),
        pytest.param([{"seq": 1}, {"seq": 1, "added": [9]}], id="repeats"),
        pytest.param([{"seq": 1}, {"seq": 3, "added": [9]}, {"seq": 2}], id="reorders"),
        pytest.param([{"seq": 0, "added": [9]}], id="begins again"),
        pytest.param([{"seq": 1, "is_snapshot": True, "added": [9]}], id="a late snapshot"),
    ],
)
async def test_watch_with_a_gap_is_resynchronised(messages: list[dict[str, Any]]) -> None:
    leader = FakeLeader()
    leader.blocks = [1, 2]
    async with _linked(leader) as linked:
        await eventually(lambda: linked.is_in)
        leader.blocks = [3]
        for message in messages:
            leader.push(**message)
        await eventually(lambda: linked.counts.num_resyncs == 1)
        await eventually(lambda: linked.is_in and linked.holds(3))
        assert not linked.holds(1), "what was known before is forgotten"
        assert not linked.holds(9), "what came out of order is not believed"
        assert leader.num_watches == 2
        assert linked.changes == [True, False, True]
        assert linked.counts == WatchCounts(num_resyncs=1)


async def test_watch_that_begins_with_a_change_is_not_believed() -> None:
    leader = FakeLeader()
    leader.is_silent = True
    async with _linked(leader) as linked:
        await eventually(lambda: leader.watches)
        leader.push(seq=0, added=[9])
        await eventually(lambda: linked.counts.num_resyncs == 1)
        assert not linked.is_in and not linked.holds(9)
        assert not linked.link.is_connected


async def test_changes_in_order_are_applied() -> None:
    leader = FakeLeader()
    leader.blocks = [1, 2]
    async with _linked(leader) as linked:
        await eventually(lambda: linked.is_in)
        leader.push(seq=1, added=[3], removed=[2])
        leader.push_load(ReplicaLoad(num_running=7), seq=2)
        await eventually(lambda: linked.table.snapshots()[0].load.num_running == 7)
        assert linked.holds(1) and linked.holds(3) and not linked.holds(2)
        assert linked.counts == WatchCounts()


async def test_replica_that_reports_nonsense_is_quarantined(
    caplog: pytest.LogCaptureFixture,
) -> None:
    leader = FakeLeader()
    leader.step_s = 0.02
    async with _linked(leader) as linked:
        await eventually(lambda: linked.is_in)
        request = EngineRequest("r", (1, 2), SamplingParams(max_tokens=20))
        stream = linked.link.submit(request)
        leader.blocks = [1]
        leader.load = _NONSENSE
        with caplog.at_level(logging.WARNING, "cluster.gateway.leader_link"):
            leader.push(seq=1, load=convert.load_to_proto(_NONSENSE))
            await eventually(lambda: linked.counts.num_quarantines >= 2)  # it still does
        assert not linked.is_in and not linked.holds(1)
        words = [record.getMessage() for record in caplog.records]
        assert words[:2] == [
            f"replica replica-1: quarantined, for it reports nonsense: late_s=nan, "
            f"limit=0 to 1e+09; watched again in {pause_s} s"
            for pause_s in (0.1, 0.2)
        ]
        leader.load = _GOOD
        await eventually(lambda: linked.is_in and linked.holds(1))
        assert linked.counts.num_resyncs == 0
        num_tokens = 0
        async with asyncio.timeout(10):
            while num_tokens < 20:  # the session went on all the time
                num_tokens += sum(len(output.tokens) for output in await stream.take())


async def test_replica_that_begins_with_nonsense_gets_no_requests() -> None:
    leader = FakeLeader()
    leader.blocks, leader.load = [1], _NONSENSE
    async with _linked(leader) as linked:
        await eventually(lambda: linked.counts.num_quarantines == 1)
        assert not linked.is_in and not linked.holds(1) and not linked.link.is_connected
        assert linked.changes == []
        leader.load = _GOOD
        await eventually(lambda: linked.is_in)


async def test_quarantine_outlasts_the_connection() -> None:
    leader = _Leader()
    leader.load = _NONSENSE
    async with _linked(leader) as linked:
        await eventually(lambda: linked.counts.num_quarantines == 3)
        next_watch_s = linked.link._next_watch_s
        leader.load = _GOOD
        leader.sessions[0].cancel()
        await eventually(lambda: len(leader.sessions) == 2)
        await eventually(lambda: linked.is_in)
        assert linked.link._next_watch_s == next_watch_s
        assert time.monotonic() >= next_watch_s


def test_watch_pause_doubles_to_half_a_minute() -> None:
    pauses = [0.0]
    for _ in range(11):
        pauses.append(watch_pause_s(pauses[-1], kept_s=5.0))
    assert pauses[1:4] == [0.1, 0.2, 0.4]
    assert pauses[-2:] == [30.0, 30.0]


def test_watch_pause_begins_anew_after_a_good_while() -> None:
    assert watch_pause_s(30.0, kept_s=29.0) == 30.0
    assert watch_pause_s(30.0, kept_s=30.0) == 0.1
