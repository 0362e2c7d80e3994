"""The leader's internal gRPC service: sessions of gateways, watchers of blocks and load.

Everything here runs on one event loop; the engine's updates are brought to it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable

import grpc

from cluster.errors import SluiceError
from cluster.kvstore.block_hash import router_key
from cluster.replica.engine_loop import EngineLoop, EngineUpdate
from cluster.rpc import convert
from cluster.rpc.sluice.internal.v1 import engine_pb2, engine_pb2_grpc
from cluster.types import EngineOutput, FinishReason, ReplicaLoad

WATCH_KEEPALIVE_S = 0.25  # a watch is hardly ever silent for longer
FLUSH_TIMEOUT_S = 10.0  # a flush waits for the present step


class _Session:
    """Requests of one gateway. Outputs that it has not taken yet are bounded by their tokens."""

    def __init__(self) -> None:
        self.live: set[str] = set()
        self.leaving: set[str] = set()  # of these, what was asked to be handed over
        self._outputs: list[EngineOutput] = []
        self._wakeup = asyncio.Event()
        self._is_over = False

    def put(self, output: EngineOutput) -> None:
        self._outputs.append(output)
        self._wakeup.set()

    def end(self) -> None:
        self._is_over = True
        self._wakeup.set()

    async def take(self) -> list[EngineOutput]:
        """Return what is there, as soon as there is any; nothing means that the gateway left."""
        await self._wakeup.wait()
        if not self._is_over:
            self._wakeup.clear()
        outputs, self._outputs = self._outputs, []
        return outputs


class _Watcher:
    """Changes that one watcher has not been sent; at most one per block, however slow it is."""

    def __init__(self, blocks: Iterable[int], load: ReplicaLoad, keepalive_s: float) -> None:
        self._keepalive_s = keepalive_s
        self._added = dict.fromkeys(blocks)
        self._removed: dict[int, None] = {}
        self._load: ReplicaLoad | None = load
        self._seq = 0
        self._wakeup = asyncio.Event()
        self._wakeup.set()

    def put(self, added: Iterable[int], removed: Iterable[int], load: ReplicaLoad | None) -> None:
        for key in removed:
            if key in self._added:
                del self._added[key]
            else:
                self._removed[key] = None
        for key in added:
            if key in self._removed:
                del self._removed[key]
            else:
                self._added[key] = None
        self._load = load or self._load
        self._wakeup.set()

    async def take(self) -> engine_pb2.WatchResponse:
        """Return what changed; after a while also nothing. The load is there if it is new."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wakeup.wait(), self._keepalive_s)
        self._wakeup.clear()
        message = engine_pb2.WatchResponse(
            seq=self._seq,
            is_snapshot=self._seq == 0,
            added=self._added,
            removed=self._removed,
            load=None if self._load is None else convert.load_to_proto(self._load),
        )
        self._seq += 1
        self._added, self._removed, self._load = {}, {}, None
        return message


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """Serves gateways.

    Args:
        on_drain: Called when somebody asks the replica to drain.
        keepalive_s: A watch that has nothing to say says so this often.
    """

    def __init__(
        self, *, on_drain: Callable[[], None], keepalive_s: float = WATCH_KEEPALIVE_S
    ) -> None:
        self._on_drain = on_drain
        self._keepalive_s = keepalive_s
        self._loop: EngineLoop | None = None
        self._owners: dict[str, _Session] = {}
        self._watchers: set[_Watcher] = set()
        self._blocks: dict[int, None] = {}
        self._load = ReplicaLoad()
        self._refusal = "UNAVAILABLE: the replica starts"

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._owners)

    def serve(self, loop: EngineLoop) -> None:
        """Accept requests for this engine."""
        self._loop = loop
        self._refusal = ""

    def refuse(self, reason: str) -> None:
        """Accept no new requests; `reason` is "CODE: message"."""
        self._refusal = self._refusal or reason
        for watcher in self._watchers:
            watcher.put((), (), self._present_load())

    def apply(self, update: EngineUpdate) -> None:
        """Pass an engine's update on to those whom it concerns."""
        for output in update.outputs:
            self._deliver(output)
        added = [router_key(block) for block in update.added_blocks]
        removed = [router_key(block) for block in update.removed_blocks]
        for key in removed:
            self._blocks.pop(key, None)
        self._blocks.update(dict.fromkeys(added))
        load = None
        if update.load is not None:
            self._load = update.load
            load = self._present_load()
        if added or removed or load is not None:
            for watcher in self._watchers:
                watcher.put(added, removed, load)

    def fail_all(self, error: str) -> None:
        """End every request with an error."""
        for request_id in list(self._owners):
            self._deliver(EngineOutput(request_id, error=error))

    def move_all(self) -> None:
        """End every request: another replica goes on with it."""
        for request_id in list(self._owners):
            self._deliver(EngineOutput(request_id, finish_reason=FinishReason.MOVED))

    def _present_load(self) -> ReplicaLoad:
        load = convert.load_to_proto(self._load)
        load.is_draining = bool(self._refusal)
        return convert.load_from_proto(load)

    def _deliver(self, output: EngineOutput) -> None:
        session = self._owners.get(output.request_id)
        if session is None:
            return
        if output.finish_reason is not None or output.error is not None:
            del self._owners[output.request_id]
            session.live.discard(output.request_id)
            session.leaving.discard(output.request_id)
        session.put(output)

    async def Session(
        self,
        request_iterator: AsyncIterator[engine_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[engine_pb2.SessionRequest, engine_pb2.SessionResponse],
    ) -> AsyncIterator[engine_pb2.SessionResponse]:
        """Carry the requests of one gateway; they end with the session."""
        session = _Session()
        reader = asyncio.create_task(self._read(session, request_iterator))
        reader.add_done_callback(lambda _: session.end())
        try:
            while outputs := await session.take():
                yield engine_pb2.SessionResponse(
                    outputs=[convert.output_to_proto(output) for output in outputs]
                )
        finally:
            reader.cancel()
            for request_id in session.live:
                self._owners.pop(request_id, None)
                if self._loop is not None:
                    self._loop.abort(request_id)

    async def _read(
        self, session: _Session, commands: AsyncIterator[engine_pb2.SessionRequest]
    ) -> None:
        async for command in commands:
            if command.HasField("submit"):
                self._submit(session, command.submit)
            elif command.HasField("hand_over"):
                self._hand_over(session, command.hand_over.request_id)
            elif command.cancel.request_id in session.live and self._loop is not None:
                self._loop.abort(command.cancel.request_id)

    def _hand_over(self, session: _Session, request_id: str) -> None:
        is_new = request_id in session.live and request_id not in session.leaving
        if is_new and self._loop is not None:
            session.leaving.add(request_id)
            self._loop.hand_over(request_id)

    def _submit(self, session: _Session, message: engine_pb2.Submit) -> None:
        request_id = message.request_id
        if request_id in self._owners:
            error = f"ALREADY_EXISTS: request_id={request_id} runs: choose another"
            session.put(EngineOutput(request_id, error=error))
        elif self._refusal or self._loop is None:
            session.put(EngineOutput(request_id, error=self._refusal))
        else:
            self._owners[request_id] = session
            session.live.add(request_id)
            try:
                self._loop.submit(convert.submit_from_proto(message))
            except SluiceError as error:
                self._deliver(EngineOutput(request_id, error=f"{error.code}: {error}"))

    async def Watch(
        self,
        request: engine_pb2.WatchRequest,
        context: grpc.aio.ServicerContext[engine_pb2.WatchRequest, engine_pb2.WatchResponse],
    ) -> AsyncIterator[engine_pb2.WatchResponse]:
        """Send all cached blocks, then changes and load."""
        watcher = _Watcher(self._blocks, self._present_load(), self._keepalive_s)
        self._watchers.add(watcher)
        try:
            while True:
                yield await watcher.take()
        finally:
            self._watchers.discard(watcher)

    async def Drain(
        self,
        request: engine_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[engine_pb2.DrainRequest, engine_pb2.DrainResponse],
    ) -> engine_pb2.DrainResponse:
        """Refuse new requests from now on; say how many there are."""
        num_requests = self.num_requests
        self._on_drain()
        return engine_pb2.DrainResponse(num_requests=num_requests)

    async def FlushCache(
        self,
        request: engine_pb2.FlushCacheRequest,
        context: grpc.aio.ServicerContext[
            engine_pb2.FlushCacheRequest, engine_pb2.FlushCacheResponse
        ],
    ) -> engine_pb2.FlushCacheResponse:
        """Forget cached blocks, between two steps of the engine."""
        if self._loop is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the replica starts: try again")
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                num_blocks = await asyncio.wrap_future(self._loop.flush_cache())
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"a step has taken longer than {FLUSH_TIMEOUT_S:g} s: try again",
            )
        except SluiceError as error:
            await context.abort(grpc.StatusCode[error.code], str(error))
        return engine_pb2.FlushCacheResponse(num_blocks=num_blocks)
