"""A link to a leader whose watch goes wrong, over real gRPC."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from gateway_fakes import FakeLeader, eventually

from cluster.clock import WallClock
from cluster.config import DEMO_MODEL_PATH, load_config
from cluster.errors import ReplicaLostError, SluiceError, UnavailableError
from cluster.gateway.leader_link import LeaderLink, WatchCounts, watch_pause_s
from cluster.gateway.stream import OutputStream
from cluster.model.checkpoint import inspect_checkpoint
from cluster.replica.build import make_engine
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.service import EngineServicer
from cluster.router.prefix_index import PrefixIndex
from cluster.router.replica_table import ReplicaTable
from cluster.rpc import convert
from cluster.rpc.sluice.internal.v1 import engine_pb2 as pb
from cluster.rpc.sluice.internal.v1 import engine_pb2_grpc
from cluster.types import EngineRequest, FinishReason, ReplicaInfo, ReplicaLoad, SamplingParams
from tests.fakes import FakeExecutor

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
async def _linked(leader: FakeLeader, silence_s: float = 10.0) -> AsyncIterator[_Linked]:
    info = await leader.start()
    table, index, counts = ReplicaTable(), PrefixIndex(), WatchCounts()
    changes: list[bool] = []
    link = LeaderLink(
        info,
        table=table,
        index=index,
        silence_s=silence_s,
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


async def _error(stream: OutputStream) -> SluiceError:
    """Return what a stream ends with."""
    async with asyncio.timeout(10):
        while True:
            try:
                await stream.take()
            except SluiceError as error:
                return error


def _request(name: str) -> EngineRequest:
    return EngineRequest(name, (1, 2), SamplingParams(max_tokens=20))


async def test_leader_that_falls_silent_is_given_up_as_a_whole_and_connected_anew() -> None:
    leader = FakeLeader()
    leader.max_steps = 2  # then it hangs
    async with _linked(leader, silence_s=1.0) as linked:
        await eventually(lambda: linked.is_in)
        answered = linked.link.submit(_request("answered"))
        assert await answered.take()
        leader.max_steps = 0
        silent = [linked.link.submit(_request(f"silent {i}")) for i in range(3)]
        leader.is_silent = True
        errors = [await _error(stream) for stream in [answered, *silent]]
        assert all(error is errors[0] for error in errors), "one death"
        assert isinstance(errors[0], ReplicaLostError)
        assert "no word for 1 s" in str(errors[0])
        assert not linked.is_in and not linked.link.is_connected
        await eventually(lambda: leader.num_live == 0)  # the session is closed too
        leader.is_silent = False
        await eventually(lambda: linked.is_in and linked.link.is_connected)


async def test_stopped_link_has_lost_no_replica() -> None:
    leader = FakeLeader()
    leader.max_steps = 0
    async with _linked(leader) as linked:
        await eventually(lambda: linked.is_in)
        stream = linked.link.submit(_request("a"))
        await linked.link.stop()
        error = await _error(stream)
        assert not isinstance(error, ReplicaLostError) and "shutting down" in str(error)
        with pytest.raises(UnavailableError, match="not connected"):
            linked.link.submit(_request("b"))


async def test_gateway_that_was_held_up_itself_gives_no_leader_up() -> None:
    leader = FakeLeader()
    leader.step_s = 0.01
    async with _linked(leader, silence_s=1.0) as linked:
        await eventually(lambda: linked.is_in)
        for seq in range(1, 4):
            time.sleep(1.5)  # noqa: ASYNC251 - it is this event loop that hangs
            await asyncio.sleep(0.15)  # a tick, and nothing of the leader
            leader.push(seq=seq)
            await asyncio.sleep(0.1)
        assert linked.changes == [True]


async def test_replica_is_told_to_drain_and_says_how_much_it_has() -> None:
    leader = FakeLeader()
    leader.max_steps = 0
    async with _linked(leader) as linked:
        with pytest.raises(UnavailableError, match="not connected"):
            await linked.link.drain(1.0)
        await eventually(lambda: linked.is_in)
        linked.link.submit(_request("a"))
        await eventually(lambda: leader.num_live == 1)
        assert await linked.link.drain(10.0) == 1
        assert leader.num_drained == 1


async def test_request_that_is_handed_over_ends_as_moved() -> None:
    leader = FakeLeader()
    leader.max_steps = 1
    async with _linked(leader) as linked:
        await eventually(lambda: linked.is_in)
        stream = linked.link.submit(_request("a"))
        await stream.take()
        linked.link.hand_over("unknown")
        linked.link.hand_over("a")
        (output,) = await asyncio.wait_for(stream.take(), 10)
        assert output.finish_reason is FinishReason.MOVED
        linked.link.hand_over("a")  # it has ended


async def test_busy_leader_keeps_its_gateways() -> None:
    """A real leader's event loop answers while its engine computes one long step."""
    executor = FakeExecutor(num_blocks=64, block_size=16, vocab_size=4096)
    executor.while_computing = lambda: _compute(3.0)
    engine = make_engine(
        load_config(None, []), inspect_checkpoint(DEMO_MODEL_PATH), executor, WallClock()
    )
    main = asyncio.get_running_loop()
    servicer = EngineServicer(on_drain=lambda: None, keepalive_s=0.1)
    loop = EngineLoop(
        engine,
        publish=lambda update: main.call_soon_threadsafe(servicer.apply, update),
        fail=lambda reason: None,
        load_interval_s=0.1,
        max_commands=8,
    )
    leader = FakeLeader()
    info = await leader.start()
    await leader.server.stop(None)
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    servicer.serve(loop)
    loop.start()
    changes: list[bool] = []
    table = ReplicaTable()
    link = LeaderLink(
        replace(info, address=f"127.0.0.1:{port}"),
        table=table,
        index=PrefixIndex(),
        silence_s=0.8,
        on_change=lambda: changes.append(True),
    )
    try:
        await eventually(lambda: link.is_connected)
        stream = link.submit(EngineRequest("a", (1, 2), SamplingParams(max_tokens=1)))
        (output,) = await asyncio.wait_for(stream.take(), 30)
        assert output.finish_reason is FinishReason.LENGTH
        assert len(changes) == 1 and link.is_connected
    finally:
        await link.stop()
        await server.stop(None)
        await asyncio.to_thread(loop.stop, 10)


def _compute(duration_s: float) -> None:
    until_s = time.monotonic() + duration_s
    while time.monotonic() < until_s:
        pass


def test_watch_pause_doubles_to_half_a_minute() -> None:
    pauses = [0.0]
    for _ in range(11):
        pauses.append(watch_pause_s(pauses[-1], kept_s=5.0))
    assert pauses[1:4] == [0.1, 0.2, 0.4]
    assert pauses[-2:] == [30.0, 30.0]


def test_watch_pause_begins_anew_after_a_good_while() -> None:
    assert watch_pause_s(30.0, kept_s=29.0) == 30.0
    assert watch_pause_s(30.0, kept_s=30.0) == 0.1
