"""A leader without Ray: fake executor, store in memory, real gRPC, milliseconds of real time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from mover_fakes import MemoryBlocks, ScriptedMover

from cluster.clock import WallClock
from cluster.config import DEMO_MODEL_PATH, StoreConfig, load_config
from cluster.errors import UnavailableError
from cluster.kvstore.block_key import block_keys, part_prefix
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.registry import Registry
from cluster.model.checkpoint import inspect_checkpoint
from cluster.replica.build import Tiers, fingerprint_of
from cluster.replica.group import GroupLifecycle, GroupState
from cluster.replica.leader import Leader
from cluster.rpc import convert
from cluster.rpc.sluice.internal.v1 import engine_pb2, engine_pb2_grpc
from cluster.step import StepResult
from cluster.types import EngineOutput, EngineRequest, FinishReason, ReplicaInfo, SamplingParams
from tests.fakes import FakeExecutor


class SlowExecutor(FakeExecutor):
    """Takes its time for each step."""

    step_s = 0.0
    measured_s = 0.0  # that it tells; 0 tells nothing
    num_shutdowns = 0

    def collect(self, timeout_s: float) -> StepResult:
        time.sleep(self.step_s)
        return replace(super().collect(timeout_s), elapsed_s=self.measured_s)

    def shutdown(self) -> None:
        self.num_shutdowns += 1
        super().shutdown()


class Group:
    """A leader that runs, with what belongs to it."""

    def __init__(
        self,
        *overrides: str,
        mover: ScriptedMover | None = None,
        blocks: MemoryBlocks | None = None,
    ) -> None:
        self.config = load_config(None, ["replica.lease_ttl_s=1", *overrides])
        self.executor = SlowExecutor(num_blocks=512, block_size=16, vocab_size=4096)
        self.store = EmbeddedStore(StoreConfig(), WallClock())
        self.ends: list[str] = []
        replica = self.config.replica
        lifecycle = GroupLifecycle(
            1,
            start_timeout_s=replica.start_timeout_s,
            drain_timeout_s=replica.drain_timeout_s,
            clock=WallClock(),
        )
        lifecycle.worker_ready(0)
        self.leader = Leader(
            self.config,
            model=inspect_checkpoint(DEMO_MODEL_PATH),
            executor=self.executor,
            lifecycle=lifecycle,
            store=self.store,
            replica_id="r1",
            node_id="n1",
            public_host="127.0.0.1",
            on_end=self.ends.append,
            tiers=Tiers(16, 2**16, mover),
            blocks=blocks,
        )


@contextlib.asynccontextmanager
async def started(
    *overrides: str, mover: ScriptedMover | None = None, blocks: MemoryBlocks | None = None
) -> AsyncIterator[tuple[Group, ReplicaInfo]]:
    group = Group(*overrides, mover=mover, blocks=blocks)
    info = await group.leader.start()
    try:
        yield group, info
    finally:
        await group.leader.stop()
        assert group.executor.is_shut_down


async def last_output(info: ReplicaInfo, max_tokens: int = 2000, name: str = "a") -> EngineOutput:
    """Send one request; return how it ended."""
    async with grpc.aio.insecure_channel(info.address) as channel:
        call = engine_pb2_grpc.EngineStub(channel).Session()
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = convert.submit_to_proto(EngineRequest(name, (1, 2, 3), sampling))
        await call.write(engine_pb2.SessionRequest(submit=request))
        async with asyncio.timeout(10):
            while True:
                message = await call.read()
                assert message is not grpc.aio.EOF, "the session broke without a word"
                for output in map(convert.output_from_proto, message.outputs):
                    if output.finish_reason or output.error:
                        return output


async def until(condition: object, timeout_s: float = 10) -> None:
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it watches another thread
            await asyncio.sleep(0.01)


async def test_leader_registers_and_serves_and_leaves() -> None:
    async with started() as (group, info):
        assert (await last_output(info, max_tokens=3)).finish_reason is not None
        await asyncio.sleep(0.05)
        assert [i.replica_id for i in await Registry(group.store).list()] == ["r1"]
    assert await Registry(group.store).list() == []


async def test_drain_waits_for_requests_up_to_its_deadline_and_moves_the_rest() -> None:
    async with started("replica.drain_timeout_s=0.3") as (group, info):
        group.executor.step_s = 0.02
        request = asyncio.create_task(last_output(info))
        await until(lambda: group.executor.plans)
        group.leader.drain()
        refused = await last_output(info, name="b")
        assert refused.error is not None and "drains" in refused.error
        assert group.leader.lifecycle.state is GroupState.DRAINING
        await asyncio.wait_for(group.leader.wait_drained(), 5)
        await group.leader.stop()
        assert (await request).finish_reason is FinishReason.MOVED
    assert group.ends == [], "a drained group has not failed"


async def drain(info: ReplicaInfo) -> int:
    """Ask a replica to leave; return how many requests it has."""
    async with grpc.aio.insecure_channel(info.address) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        return int((await stub.Drain(engine_pb2.DrainRequest())).num_requests)


async def test_replica_that_was_told_to_leave_ends_itself_when_it_is_idle() -> None:
    async with started() as (group, info):
        group.executor.step_s = 0.02
        request = asyncio.create_task(last_output(info, max_tokens=20))
        await until(lambda: group.executor.plans)
        assert await drain(info) == 1
        assert await drain(info) == 1, "again is fine"
        assert (await request).finish_reason is FinishReason.LENGTH
        await until(lambda: group.ends)
        assert await Registry(group.store).list() == []
        assert group.executor.is_shut_down
    assert group.ends == ["drained"]


async def test_replica_that_its_owner_drains_is_ended_by_its_owner() -> None:
    async with started() as (group, info):
        group.executor.step_s = 0.02
        request = asyncio.create_task(last_output(info, max_tokens=20))
        await until(lambda: group.executor.plans)
        group.leader.drain()
        await drain(info)
        await asyncio.wait_for(group.leader.wait_drained(), 10)
        await request
        await asyncio.sleep(0.3)
        assert not group.executor.is_shut_down
    assert group.ends == []


async def test_owner_that_ends_a_leaving_replica_ends_it_once() -> None:
    async with started("replica.drain_timeout_s=0.2") as (group, info):
        await drain(info)
        group.leader.drain()
        await asyncio.wait_for(group.leader.wait_drained(), 10)
        await asyncio.gather(group.leader.stop(), group.leader.stop())
        await until(lambda: group.ends)
    assert group.ends == ["drained"] and group.executor.num_shutdowns == 1


async def test_failed_engine_ends_requests_and_group_once() -> None:
    async with started() as (group, info):
        group.executor.collect_fails = True
        output = await last_output(info)
        assert output.error is not None and output.error.startswith("LOST: ")
        await until(lambda: group.ends)
        assert len(group.ends) == 1
        with pytest.raises(UnavailableError, match="worker 0 died"):
            group.leader.check_health()


async def test_step_that_hangs_in_this_process_ends_the_group() -> None:
    async with started("engine.step_timeout_s=0.1") as (group, info):
        group.executor.step_s = 2.0
        output = await last_output(info)
        assert output.error is not None and "engine.step_timeout_s=0.1" in output.error
        await until(lambda: group.ends)


async def test_request_that_a_failed_group_never_had_is_refused_and_not_lost() -> None:
    async with started() as (group, info):
        group.leader.fail("for a test")
        output = await last_output(info)
        assert output.error is not None and output.error.startswith("UNAVAILABLE: ")


STUCK = ("replica.heartbeat_timeout_s=0.3", "replica.stuck_timeout_s=0.6")


async def test_blocked_engine_whose_process_answers_ends_the_group() -> None:
    async with started(*STUCK) as (group, info):
        group.executor.step_s = 3.0  # it waits
        output = await last_output(info)
        assert output.error is not None and output.error.startswith("LOST: ")
        assert "the engine is stuck" in output.error
        await until(lambda: group.ends)


async def test_engine_that_computes_for_long_keeps_its_group() -> None:
    async with started(*STUCK) as (group, info):
        group.executor.while_computing = lambda: compute(3.0)
        assert (await last_output(info, max_tokens=1)).finish_reason is FinishReason.LENGTH
        assert group.ends == [] and group.leader.lifecycle.state is GroupState.READY


def compute(duration_s: float) -> None:
    until_s = time.monotonic() + duration_s
    while time.monotonic() < until_s:
        pass


async def test_event_loop_that_hangs_ends_the_group_without_it() -> None:
    group = Group(*STUCK)
    await group.leader.start()
    time.sleep(3.0)  # noqa: ASYNC251 - it is to hang
    assert group.ends == ["the leader's event loop hangs: replica.stuck_timeout_s=0.6"]
    await group.leader.stop()
    assert len(group.ends) == 1


async def test_lease_is_renewed_after_the_store_was_away() -> None:
    async with started() as (group, _):
        await asyncio.sleep(0.05)
        put, group.store.put_lease = group.store.put_lease, broken  # type: ignore[method-assign]
        await asyncio.sleep(1.1)
        assert await Registry(group.store).list() == []
        group.store.put_lease = put  # type: ignore[method-assign]
        await asyncio.sleep(0.4)
        assert len(await Registry(group.store).list()) == 1


def stored_blocks(num_blocks: int) -> tuple[MemoryBlocks, list[bytes]]:
    """Return a store with blocks of the shipped model, and of others; and the former's hashes."""
    prefix = part_prefix(fingerprint_of(load_config(None, [])), pp=1, part=0)
    hashes = [bytes([i]) * 16 for i in range(num_blocks)]
    ours = block_keys(prefix, hashes)
    other = block_keys(prefix[:-1] + b"x", hashes)
    return MemoryBlocks(dict.fromkeys([*other, *ours], b"")), hashes


async def test_warm_up_fetches_the_hottest_blocks_before_the_lease() -> None:
    blocks, hashes = stored_blocks(20)
    mover = ScriptedMover()
    mover.is_silent = True
    group = Group(mover=mover, blocks=blocks)
    starting = asyncio.create_task(group.leader.start())
    await until(lambda: mover.moves)
    await asyncio.sleep(0.05)
    assert await Registry(group.store).list() == []
    mover.is_silent = False
    await asyncio.wait_for(starting, 5)
    assert [h for move in mover.moves for h in move.hashes] == hashes[:8], "half of the slots"
    await until(lambda: group.leader.load.cache.num_host_blocks == 8)
    await group.leader.stop()


@pytest.mark.parametrize("failure", [UnavailableError("away"), RuntimeError("a bug")])
async def test_warm_up_of_a_dead_store_is_a_cold_start(failure: Exception) -> None:
    blocks, _ = stored_blocks(20)
    blocks.fails = failure
    async with started(mover=ScriptedMover(), blocks=blocks) as (_, info):
        assert (await last_output(info, max_tokens=3)).finish_reason is not None


@pytest.mark.parametrize("who", ["store", "mover"])
async def test_warm_up_waits_no_longer_than_its_time(who: str) -> None:
    blocks, _ = stored_blocks(20)
    mover = ScriptedMover()
    mover.is_silent = who == "mover"
    if who == "store":
        blocks.gate = asyncio.Event()
    start_s = time.monotonic()
    override = "replica.warm_up_timeout_s=0.2"
    async with started(override, mover=mover, blocks=blocks) as (group, info):
        assert 0.2 <= time.monotonic() - start_s < 2
        mover.is_silent = False  # what comes late is welcome
        assert (await last_output(info, max_tokens=3)).finish_reason is not None
        num_blocks = 8 if who == "mover" else 0
        await until(lambda: group.leader.load.cache.num_host_blocks >= num_blocks)


async def test_no_warm_up_where_its_time_is_zero() -> None:
    blocks, _ = stored_blocks(20)
    override = "replica.warm_up_timeout_s=0"
    async with started(override, mover=ScriptedMover(), blocks=blocks):
        assert blocks.calls == []


async def broken(*_arguments: object) -> None:
    raise RuntimeError("what nobody expected")


async def test_step_times_outlive_the_leader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_CACHE_DIR", str(tmp_path))
    async with started() as (group, info):
        group.executor.measured_s = 0.125
        await last_output(info, max_tokens=4)
    (file,) = (tmp_path / "step_time").iterdir()
    assert [row[-1] for row in json.loads(file.read_text())["steps"]] == [0.125] * 4
    async with started() as (group, info):
        await until(lambda: group.leader.load.step_cost is not None)
        assert group.leader.load.step_cost.num_steps == 4
        async with grpc.aio.insecure_channel(info.address) as channel:
            watch = engine_pb2_grpc.EngineStub(channel).Watch(engine_pb2.WatchRequest())
            load = convert.load_from_proto((await watch.read()).load)
        assert load.step_cost == group.leader.load.step_cost
