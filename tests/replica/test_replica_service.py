"""The leader's internal service over real gRPC, with a real engine on a fake executor."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import grpc
import pytest

from cluster.clock import WallClock
from cluster.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.kvstore.block_hash import block_hashes, router_key
from cluster.replica import service
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.service import EngineServicer
from cluster.rpc import convert
from cluster.rpc.sluice.internal.v1 import engine_pb2, engine_pb2_grpc
from cluster.step import StepResult
from cluster.types import EngineOutput, EngineRequest, FinishReason, SamplingParams
from tests.fakes import FakeExecutor

FINGERPRINT = b"model"
BLOCK_SIZE = 4
KEEPALIVE_S = 0.3


class GatedExecutor(FakeExecutor):
    """A step ends only while the gate is open."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks=num_blocks, block_size=block_size)
        self.gate = threading.Event()
        self.gate.set()

    def collect(self, timeout_s: float) -> StepResult:
        assert self.gate.wait(10)
        return super().collect(timeout_s)


@dataclass
class Running:
    executor: GatedExecutor
    engine: Engine
    loop: EngineLoop
    servicer: EngineServicer
    address: str
    failures: list[str]


@contextlib.asynccontextmanager
async def running(num_blocks: int = 64, max_num_waiting: int = 64) -> AsyncIterator[Running]:
    executor = GatedExecutor(num_blocks=num_blocks, block_size=BLOCK_SIZE)
    config = EngineConfig(max_num_waiting=max_num_waiting)
    engine = Engine(
        config,
        executor=executor,
        block_size=BLOCK_SIZE,
        max_model_len=4096,
        fingerprint=FINGERPRINT,
        eos_token_ids=frozenset(),
        vocab_size=1000,
        prefix_caching=True,
        clock=WallClock(),
    )
    failures: list[str] = []
    main = asyncio.get_running_loop()
    servicer = EngineServicer(
        on_drain=lambda: servicer.refuse("UNAVAILABLE: drains"), keepalive_s=KEEPALIVE_S
    )
    loop = EngineLoop(
        engine,
        publish=lambda update: main.call_soon_threadsafe(servicer.apply, update),
        fail=failures.append,
        load_interval_s=0.01,
        max_commands=config.max_num_waiting,
    )
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    servicer.serve(loop)
    loop.start()
    try:
        yield Running(executor, engine, loop, servicer, f"127.0.0.1:{port}", failures)
    finally:
        await server.stop(0)
        loop.stop(5)


class Gateway:
    """A gateway's end of a session."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = engine_pb2_grpc.EngineStub(channel).Session()

    async def submit(self, request_id: str, num_prompt: int = 6, max_tokens: int = 5) -> None:
        request = EngineRequest(
            request_id,
            tuple(range(num_prompt)),
            SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        )
        submit = convert.submit_to_proto(request)
        await self._call.write(engine_pb2.SessionRequest(submit=submit))

    async def cancel(self, request_id: str) -> None:
        cancel = engine_pb2.Cancel(request_id=request_id)
        await self._call.write(engine_pb2.SessionRequest(cancel=cancel))

    async def hand_over(self, request_id: str) -> None:
        hand_over = engine_pb2.HandOver(request_id=request_id)
        await self._call.write(engine_pb2.SessionRequest(hand_over=hand_over))

    async def outputs(self, num_ends: int = 1) -> list[EngineOutput]:
        """Read until `num_ends` requests have ended."""
        seen: list[EngineOutput] = []
        while sum(o.finish_reason is not None or o.error is not None for o in seen) < num_ends:
            message = await asyncio.wait_for(self._call.read(), 10)
            assert message is not grpc.aio.EOF
            seen += [convert.output_from_proto(output) for output in message.outputs]
        return seen

    def leave(self) -> None:
        self._call.cancel()


@contextlib.asynccontextmanager
async def gateway(to: Running) -> AsyncIterator[Gateway]:
    async with grpc.aio.insecure_channel(to.address) as channel:
        yield Gateway(channel)


async def until(condition: object, timeout_s: float = 10) -> None:
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it watches another thread
            await asyncio.sleep(0.01)


async def test_session_carries_several_requests_to_their_ends() -> None:
    async with running() as leader, gateway(leader) as session:
        for request_id in ("a", "b", "c"):
            await session.submit(request_id)
        outputs = await session.outputs(num_ends=3)
        for request_id in ("a", "b", "c"):
            mine = [o for o in outputs if o.request_id == request_id]
            assert sum(len(o.tokens) for o in mine) == 5
            assert mine[-1].finish_reason is FinishReason.LENGTH
            assert all(o.finish_reason is None for o in mine[:-1])
        await until(lambda: leader.servicer.num_requests == 0)


async def test_cancel_ends_the_request_in_the_step_after_it() -> None:
    async with running() as leader, gateway(leader) as session:
        leader.executor.gate.clear()
        await session.submit("a", max_tokens=200)
        await until(lambda: leader.executor.plans)
        await session.cancel("a")
        await until(lambda: leader.loop.num_commands)
        leader.executor.gate.set()
        outputs = await session.outputs()
        assert outputs[-1].finish_reason is FinishReason.CANCELLED
        assert sum(len(output.tokens) for output in outputs) <= 1
        await until(lambda: leader.engine.load().num_free_blocks == 64)
        assert len(leader.executor.plans) == 1


async def test_request_that_is_handed_over_ends_as_moved() -> None:
    async with running(num_blocks=1024) as leader, gateway(leader) as session:
        leader.executor.gate.clear()
        await session.submit("a", max_tokens=4000)
        await session.submit("b")
        await until(lambda: leader.executor.plans and leader.servicer.num_requests == 2)
        num_before = leader.loop.num_commands
        await session.hand_over("a")
        await session.hand_over("a")
        await session.hand_over("unknown")
        await session.hand_over("b")
        await session.submit("c")
        await until(lambda: leader.servicer.num_requests == 3)
        assert leader.loop.num_commands == num_before + 3, "each is asked for once, strangers never"
        leader.executor.gate.set()
        outputs = await session.outputs(num_ends=3)
        ends = {o.request_id: o.finish_reason for o in outputs if o.finish_reason}
        moved, length = FinishReason.MOVED, FinishReason.LENGTH
        assert ends == {"a": moved, "b": moved, "c": length}
        await until(lambda: leader.servicer.num_requests == 0)
        await until(lambda: leader.engine.load().num_free_blocks == 1024)


async def test_watch_with_nothing_to_say_says_so_in_time() -> None:
    async with running() as leader, gateway(leader) as session:
        leader.executor.gate.clear()  # no report of the load while a step is computed
        await session.submit("a")
        await until(lambda: leader.executor.plans)
        async with grpc.aio.insecure_channel(leader.address) as channel:
            watch = engine_pb2_grpc.EngineStub(channel).Watch(engine_pb2.WatchRequest())
            messages = watching(watch)
            async with asyncio.timeout(20 * KEEPALIVE_S):
                seqs = [(await anext(messages)).seq for _ in range(6)]
        assert seqs == [0, 1, 2, 3, 4, 5]
        leader.executor.gate.set()
        await session.outputs()


async def test_session_that_breaks_ends_its_requests() -> None:
    async with running(num_blocks=1024) as leader, gateway(leader) as session:
        leader.executor.gate.clear()
        await session.submit("a", max_tokens=4000)
        await until(lambda: leader.executor.plans)
        session.leave()
        await until(lambda: leader.servicer.num_requests == 0)
        leader.executor.gate.set()
        await until(lambda: not leader.engine.has_work)
        assert len(leader.executor.plans) == 1


async def test_same_request_id_from_two_gateways_is_refused() -> None:
    async with running(num_blocks=1024) as leader, gateway(leader) as one, gateway(leader) as two:
        leader.executor.gate.clear()
        await one.submit("a", max_tokens=4000)
        await until(lambda: leader.servicer.num_requests == 1)
        await two.submit("a")
        (output,) = await two.outputs()
        assert output.error is not None and output.error.startswith("ALREADY_EXISTS")
        await one.cancel("a")
        await until(lambda: leader.loop.num_commands)
        leader.executor.gate.set()
        assert (await one.outputs())[-1].finish_reason is FinishReason.CANCELLED


async def test_request_that_can_never_fit_is_refused_and_others_go_on() -> None:
    async with running(num_blocks=4) as leader, gateway(leader) as session:
        await session.submit("big", num_prompt=100)
        (output,) = await session.outputs()
        assert output.error is not None and output.error.startswith("INVALID_ARGUMENT")
        await session.submit("small")
        assert (await session.outputs())[-1].finish_reason is FinishReason.LENGTH


async def test_drain_refuses_new_requests_and_lets_old_ones_finish() -> None:
    async with running(num_blocks=1024) as leader, gateway(leader) as session:
        leader.executor.gate.clear()
        await session.submit("old", max_tokens=500)
        await until(lambda: leader.servicer.num_requests == 1)
        async with grpc.aio.insecure_channel(leader.address) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            assert (await stub.Drain(engine_pb2.DrainRequest())).num_requests == 1
        await session.submit("new")
        (refused,) = await session.outputs()
        assert refused.request_id == "new"
        leader.executor.gate.set()
        outputs = [refused, *await session.outputs()]
        by_id = {o.request_id: o for o in outputs}
        assert by_id["new"].error is not None
        assert by_id["old"].finish_reason is FinishReason.LENGTH


async def test_flush_forgets_what_no_request_uses() -> None:
    async with running() as leader, gateway(leader) as session:
        await session.submit("a", num_prompt=9)
        await session.outputs()
        async with grpc.aio.insecure_channel(leader.address) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            for expected in (3, 0):  # 9 + 5 tokens, the last one is in no block
                reply = await stub.FlushCache(engine_pb2.FlushCacheRequest())
                assert reply.num_blocks == expected
            leader.loop.stop(5)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.FlushCache(engine_pb2.FlushCacheRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_flush_waits_for_the_present_step_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "FLUSH_TIMEOUT_S", 0.1)
    async with running() as leader, gateway(leader) as session:
        leader.executor.gate.clear()
        await session.submit("a")
        await until(lambda: leader.executor.plans)
        async with grpc.aio.insecure_channel(leader.address) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.FlushCache(engine_pb2.FlushCacheRequest())
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        leader.executor.gate.set()
        assert (await session.outputs())[-1].finish_reason is FinishReason.LENGTH


async def test_dead_executor_ends_every_request_with_the_loss() -> None:
    async with running() as leader, gateway(leader) as session:
        leader.executor.collect_fails = True
        await session.submit("a")
        (output,) = await session.outputs()
        assert output.error == "LOST: worker 0 died"
        await until(lambda: leader.failures == ["worker 0 died"])


async def test_watch_sends_the_whole_set_then_changes_in_order() -> None:
    async with running(num_blocks=8) as leader, gateway(leader) as session:
        await session.submit("a", num_prompt=9)
        await session.outputs()
        await until(lambda: not leader.engine.has_work)
        await asyncio.sleep(0.05)
        prompt_keys = [
            router_key(h) for h in block_hashes(range(9), BLOCK_SIZE, fingerprint=FINGERPRINT)
        ]
        async with grpc.aio.insecure_channel(leader.address) as channel:
            watch = engine_pb2_grpc.EngineStub(channel).Watch(engine_pb2.WatchRequest())
            messages = watching(watch)
            first = await anext(messages)
            assert first.is_snapshot and first.seq == 0
            assert set(prompt_keys) <= set(first.added)
            assert first.load.num_blocks == 8
            known, seq = set(first.added), 0
            for n in range(6):  # more blocks than there are: old ones have to go
                await session.submit(f"b{n}", num_prompt=13 + 4 * (n % 2))
                await session.outputs()
            async with asyncio.timeout(10):
                while known != {router_key(h) for h in leader.engine.cached_blocks()}:
                    message = await anext(messages)
                    seq += 1
                    assert message.seq == seq and not message.is_snapshot
                    known -= set(message.removed)
                    known |= set(message.added)


async def watching(
    call: grpc.aio.UnaryStreamCall[engine_pb2.WatchRequest, engine_pb2.WatchResponse],
) -> AsyncIterator[engine_pb2.WatchResponse]:
    async for message in call:
        yield message


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "engine"]
