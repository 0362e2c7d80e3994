"""A leader without an engine, and what a gateway needs around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from cluster.client import AsyncClient
from cluster.clock import WallClock
from cluster.config import ClusterConfig, parse_config
from cluster.gateway.grpc_server import GatewayServer
from cluster.kvstore.block_store import BlockStore
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.registry import Registry
from cluster.kvstore.store import Store
from cluster.metrics import Metrics
from cluster.router.dispatcher import Dispatcher
from cluster.rpc import convert
from cluster.rpc.sluice.internal.v1 import engine_pb2 as pb
from cluster.rpc.sluice.internal.v1 import engine_pb2_grpc
from cluster.types import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    ReplicaInfo,
    ReplicaLoad,
    SampledToken,
)

FINGERPRINT = b"\x07" * 16
BLOCK_SIZE = 16
END_OF_TEXT = 0


class FakeLeader(engine_pb2_grpc.EngineServicer):
    """Answers every request with `script`, over and over, one token per step.

    A request with tokens so far goes on behind them. One that is to be handed over moves at once.

    Attributes are changed by tests while it serves.
    """

    def __init__(self, replica_id: str = "replica-1", max_model_len: int = 512) -> None:
        self.replica_id = replica_id
        self.max_model_len = max_model_len
        self.script: Sequence[SampledToken] = [SampledToken(token) for token in range(64, 96)]
        self.step_s = 0.0
        self.max_steps: int | None = None  # then the request hangs
        self.refusal = ""  # "CODE: message" for all new requests
        self.load = ReplicaLoad(num_blocks=100, num_free_blocks=100)
        self.submitted: list[EngineRequest] = []
        self.cancelled: list[str] = []
        self.num_live = 0
        self.num_watches = 0
        self.watches: list[asyncio.Queue[pb.WatchResponse]] = []
        self.is_silent = False  # accepts watches, says nothing
        self.blocks: list[int] = []
        self.num_flushed = 0  # times
        self.flush_fails = False
        self.num_drained = 0  # times

    async def start(self) -> ReplicaInfo:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        engine_pb2_grpc.add_EngineServicer_to_server(self, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return ReplicaInfo(
            replica_id=self.replica_id,
            address=f"127.0.0.1:{port}",
            model="sluice-demo",
            fingerprint=FINGERPRINT.hex(),
            tp=1,
            pp=1,
            block_size=BLOCK_SIZE,
            max_model_len=self.max_model_len,
            pid=4242,
        )

    async def die(self) -> None:
        await self.server.stop(None)

    def push(self, **fields: Any) -> None:
        """Send every watcher a message."""
        for queue in self.watches:
            queue.put_nowait(pb.WatchResponse(**fields))

    def push_load(self, load: ReplicaLoad, seq: int = 1) -> None:
        self.load = load
        self.push(seq=seq, load=convert.load_to_proto(load))

    async def FlushCache(self, request: Any, context: Any) -> pb.FlushCacheResponse:
        if self.flush_fails:
            await context.abort(grpc.StatusCode.INTERNAL, "cannot")
        self.num_flushed += 1
        return pb.FlushCacheResponse(num_blocks=len(self.blocks))

    async def Drain(self, request: Any, context: Any) -> pb.DrainResponse:
        self.num_drained += 1
        return pb.DrainResponse(num_requests=self.num_live)

    async def Watch(self, request: Any, context: Any) -> None:
        self.num_watches += 1
        queue: asyncio.Queue[pb.WatchResponse] = asyncio.Queue()
        if not self.is_silent:
            queue.put_nowait(
                pb.WatchResponse(
                    is_snapshot=True, added=self.blocks, load=convert.load_to_proto(self.load)
                )
            )
        self.watches.append(queue)
        try:
            while True:
                await context.write(await queue.get())
        finally:
            self.watches.remove(queue)

    async def Session(self, commands: AsyncIterator[pb.SessionRequest], context: Any) -> None:
        outputs: asyncio.Queue[EngineOutput] = asyncio.Queue()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(commands, outputs))
            while True:  # one writer: gRPC takes one message at a time
                output = convert.output_to_proto(await outputs.get())
                await context.write(pb.SessionResponse(outputs=[output]))

    async def _read(
        self, commands: AsyncIterator[pb.SessionRequest], outputs: asyncio.Queue[EngineOutput]
    ) -> None:
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            async for command in commands:
                if command.HasField("submit"):
                    request = convert.submit_from_proto(command.submit)
                    self.submitted.append(request)
                    tasks[request.request_id] = asyncio.create_task(self._answer(request, outputs))
                elif command.HasField("hand_over"):
                    request_id = command.hand_over.request_id
                    tasks[request_id].cancel()
                    outputs.put_nowait(EngineOutput(request_id, finish_reason=FinishReason.MOVED))
                else:
                    self.cancelled.append(command.cancel.request_id)
                    tasks[command.cancel.request_id].cancel()
        finally:
            for task in tasks.values():
                task.cancel()

    async def _answer(self, request: EngineRequest, outputs: asyncio.Queue[EngineOutput]) -> None:
        self.num_live += 1
        try:
            if self.refusal:
                outputs.put_nowait(EngineOutput(request.request_id, error=self.refusal))
                return
            num_before = len(request.output_token_ids)
            for step in range(num_before, request.sampling.max_tokens):
                if self.max_steps is not None and step - num_before >= self.max_steps:
                    await asyncio.sleep(3600)
                await asyncio.sleep(self.step_s)
                token = self.script[step % len(self.script)]
                is_last = step + 1 == request.sampling.max_tokens
                reason = FinishReason.LENGTH if is_last else None
                if token.token_id == END_OF_TEXT and not request.sampling.ignore_eos:
                    reason = FinishReason.STOP
                outputs.put_nowait(EngineOutput(request.request_id, (token,), 3, reason))
                if reason is not None:
                    return
        finally:
            self.num_live -= 1


class Stage:
    """A gateway, its store, and leaders."""

    def __init__(
        self,
        config: ClusterConfig,
        block_store: BlockStore | None = None,
        *,
        store: Store | None = None,
        gateway_id: str = "gateway-1",
    ) -> None:
        self.config = config
        self.store = store or EmbeddedStore(config.store, clock=WallClock())
        self.blocks = block_store
        self.registry = Registry(self.store)
        self.metrics = CollectorRegistry()
        self.server = GatewayServer(
            config,
            store=self.store,
            gateway_id=gateway_id,
            block_store=block_store,
            metrics=Metrics(self.metrics),
        )
        self.leaders: list[FakeLeader] = []
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def add(self, leader: FakeLeader) -> FakeLeader:
        """Start a leader, register it, wait until the gateway routes to it."""
        info = await leader.start()
        self.leaders.append(leader)
        await self.registry.register(info, 3600)
        if self.port:
            await eventually(lambda: leader.replica_id in self.routed_to)
        return leader

    @property
    def routed_to(self) -> list[str]:
        """Ids of the replicas that requests can go to."""
        return [snapshot.info.replica_id for snapshot in self.server.snapshots()]

    @property
    def dispatcher(self) -> Dispatcher:
        """That of the gateway."""
        return self.server._waiting._dispatcher

    def value(self, name: str, **labels: str) -> float:
        """Return what a metric of the gateway shows; 0 where it has no such labels yet."""
        return self.metrics.get_sample_value(name, labels) or 0.0

    async def wait_state(self, replica_id: str, state: str | None) -> None:
        """Return once the gateway reports the state; None is unknown."""

        async def is_so(client: AsyncClient) -> bool:
            replicas = {r.replica_id: r.state for r in (await client.status()).replicas}
            return replicas.get(replica_id) == state

        async with AsyncClient(self.address) as client:
            await eventually(lambda: is_so(client))


async def eventually(condition: Any, timeout_s: float = 10.0) -> None:
    """Return once `condition()`, plain or awaitable, is true."""
    async with asyncio.timeout(timeout_s):
        while True:
            result = condition()
            if await result if asyncio.iscoroutine(result) else result:
                return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def stage(*leaders: FakeLeader, **gateway: Any) -> AsyncIterator[Stage]:
    """Run a gateway in front of leaders; what a test left running is ended.

    With `store` and `gateway_id` it is one of several, which know each other's leaders.
    """
    block_store = gateway.pop("block_store", None)
    shared = {name: gateway.pop(name) for name in ("store", "gateway_id") if name in gateway}
    names = ("replica", "auth", "cache", "engine", "router")
    sections = {name: gateway.pop(name, {}) for name in names}
    # A fake leader says nothing where it has nothing to say.
    sections["replica"] = {"heartbeat_timeout_s": 60.0, **sections["replica"]}
    config = parse_config({"gateway": {"port": 0, **gateway}, **sections})
    running = Stage(config, block_store, **shared)
    running.port = await running.server.start()
    try:
        for leader in leaders:
            await running.add(leader)
        yield running
    finally:
        await running.server.stop(0.0)
        for leader in running.leaders:
            await leader.server.stop(None)
