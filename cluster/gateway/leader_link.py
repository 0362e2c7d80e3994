"""A gateway's connection to one leader: a session for requests, a watch for blocks and load.

    connecting ──► watch's snapshot came: up, in table and index ──► session or channel broke: down
        ▲                                                                │ requests end, leaves
        └───────────────────────── backoff ◄─────────────────────────────┘ table and index

A watch that falls silent is a leader that hangs, or is cut off: a busy one answers, whatever it
computes. All of the connection is given up, and its requests go elsewhere. The session goes on
where the messages of a watch skip, repeat or come out of order, and where one reports a load which
cannot be true: the replica is quarantined. These watches are opened anew after a pause, twice as
long each time, so that a broken leader costs its gateways little.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.errors import ReplicaLostError, SluiceError, UnavailableError
from cluster.gateway.stream import OutputStream
from cluster.replica.liveness import Silence
from cluster.router.plausible import check_load
from cluster.router.prefix_index import PrefixIndex
from cluster.router.replica_table import ReplicaTable
from cluster.rpc import convert
from cluster.rpc.sluice.internal.v1 import engine_pb2, engine_pb2_grpc
from cluster.types import EngineRequest, ReplicaInfo

logger = logging.getLogger(__name__)

_MIN_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0
_MIN_WATCH_PAUSE_S = 0.1
_MAX_WATCH_PAUSE_S = 30.0
_TICKS = 10  # of the time for which a watch may be silent
_MAX_COMMANDS = 65536  # waiting to be written to a leader
_WRITE_TIMEOUT_S = 5.0  # a leader that reads nothing for so long is given up
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 256 * 2**20),  # a snapshot of 30 million blocks
    ("grpc.max_send_message_length", 64 * 2**20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # a minute otherwise, whatever the timeout above is
    ("grpc.use_local_subchannel_pool", 1),  # each attempt connects anew, with our backoff
    ("grpc.enable_retries", 0),
)


@dataclass(slots=True)
class WatchCounts:
    """What was wrong with the watches of a gateway, since its start."""

    num_resyncs: int = 0  # opened anew: a message was missing, repeated or out of order
    num_quarantines: int = 0  # likewise: a report of the load could not be true


class LeaderLink:
    """Keeps one leader connected for as long as it is running.

    Args:
        info: Of the replica.
        table: Holds the replica while it is up.
        index: Likewise its blocks.
        silence_s: A leader that is silent for so long is given up, seconds.
        on_change: Called when the replica has come, gone, begun or ended to drain.
        counts: What goes wrong with the watch is added to these.
    """

    def __init__(
        self,
        info: ReplicaInfo,
        *,
        table: ReplicaTable,
        index: PrefixIndex,
        silence_s: float,
        on_change: Callable[[], None],
        counts: WatchCounts | None = None,
    ) -> None:
        self.info = info
        self._table = table
        self._index = index
        self._tick_s = silence_s / _TICKS
        self._silence = Silence(silence_s, self._tick_s)
        self._is_watching = False
        self._on_change = on_change
        self._counts = counts or WatchCounts()
        self._watch_pause_s = 0.0  # before the present watch
        self._next_watch_s = 0.0  # none is opened before, by the gateway's clock
        self._streams: dict[str, OutputStream] = {}
        self._commands: deque[engine_pb2.SessionRequest] = deque()
        self._has_commands = asyncio.Event()
        self._is_connected = False
        self._stub: engine_pb2_grpc.EngineStub | None = None
        self._loss = ""  # why the connection was given up
        self._is_stopped = False
        self._task = asyncio.create_task(self._run(), name=f"link {info.replica_id}")

    @property
    def is_connected(self) -> bool:
        """Whether the leader has answered and the session has not broken since."""
        return self._is_connected

    async def stop(self) -> None:
        """Close the connection; its requests end."""
        self._is_stopped = True
        self._task.cancel()
        await asyncio.wait([self._task])

    def submit(self, request: EngineRequest) -> OutputStream:
        """Begin a request.

        Raises:
            UnavailableError: The leader is not connected.
        """
        if not self._is_connected:
            raise UnavailableError(f"replica {self.info.replica_id} is not connected: try again")
        if len(self._commands) >= _MAX_COMMANDS:
            raise UnavailableError(f"replica {self.info.replica_id} does not keep up: try again")
        stream = self._streams[request.request_id] = OutputStream()
        self._send(engine_pb2.SessionRequest(submit=convert.submit_to_proto(request)))
        return stream

    def cancel(self, request_id: str) -> None:
        """End a request; one that has ended already is left alone."""
        if self._forget(request_id) is not None:
            self._send(engine_pb2.SessionRequest(cancel=engine_pb2.Cancel(request_id=request_id)))

    def hand_over(self, request_id: str) -> None:
        """Have a request end as MOVED; one that has ended already is left alone."""
        if request_id in self._streams:
            hand_over = engine_pb2.HandOver(request_id=request_id)
            self._send(engine_pb2.SessionRequest(hand_over=hand_over))

    async def drain(self, timeout_s: float) -> int:
        """Have the replica take no new requests and leave; return how many it has.

        Raises:
            UnavailableError: The leader is not connected, or has not answered in time.
        """
        response = await self._ask(lambda stub: stub.Drain, engine_pb2.DrainRequest(), timeout_s)
        return int(response.num_requests)

    async def flush_cache(self, timeout_s: float) -> int:
        """Have the replica forget every cached block that no request uses; return how many.

        Raises:
            UnavailableError: The leader is not connected, or not done in `timeout_s` seconds.
        """
        response = await self._ask(
            lambda stub: stub.FlushCache, engine_pb2.FlushCacheRequest(), timeout_s
        )
        return int(response.num_blocks)

    async def _ask(
        self, method: Callable[[engine_pb2_grpc.EngineStub], Any], request: Any, timeout_s: float
    ) -> Any:
        if self._stub is None or not self._is_connected:
            raise UnavailableError(f"replica {self.info.replica_id} is not connected: try again")
        try:
            return await method(self._stub)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(
                f"replica {self.info.replica_id}: {error.code().name}: {error.details()}"
            ) from error

    def _forget(self, request_id: str) -> OutputStream | None:
        return self._streams.pop(request_id, None)

    def _send(self, command: engine_pb2.SessionRequest) -> None:
        self._commands.append(command)
        self._has_commands.set()

    async def _run(self) -> None:
        backoff_s = _MIN_BACKOFF_S
        # A group of tasks one of which fails while it is cancelled forgets that it was.
        while not self._is_stopped:
            try:
                await self._connect()
            except* (grpc.aio.AioRpcError, UnavailableError) as group:
                self._loss = _reason(group)
                logger.warning("replica %s: %s", self.info.replica_id, self._loss)
            except* Exception as group:
                self._loss = _reason(group)
                logger.exception("replica %s: connection given up", self.info.replica_id)
            finally:
                was_connected = self._is_connected
                self._lose()
            backoff_s = _MIN_BACKOFF_S if was_connected else min(2 * backoff_s, _MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s)

    async def _connect(self) -> None:
        """Stay connected until the session or the channel breaks, which raises."""
        async with (
            grpc.aio.insecure_channel(self.info.address, options=_CHANNEL_OPTIONS) as channel,
            asyncio.TaskGroup() as tasks,
        ):
            self._stub = stub = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]
            session = stub.Session()
            tasks.create_task(self._read_outputs(session))
            tasks.create_task(self._write_commands(session))
            tasks.create_task(self._watch(stub))
            tasks.create_task(self._time_silence())

    def _lose(self) -> None:
        self._is_connected = False
        self._stub = None
        self._commands.clear()
        streams, self._streams = self._streams, {}
        error: SluiceError
        if self._is_stopped:
            error = UnavailableError("this gateway is shutting down: connect again")
        else:
            error = ReplicaLostError(
                f"replica {self.info.replica_id} died: {self._loss}; try again"
            )
        for stream in streams.values():
            stream.fail(error)

    def _leave(self) -> None:
        if self.info.replica_id in self._table:
            self._table.remove(self.info.replica_id)
            self._index.drop(self.info.replica_id)
            self._on_change()

    async def _read_outputs(self, session: _Session) -> None:
        async for response in session:
            for message in response.outputs:
                stream = self._streams.get(message.request_id)
                if stream is None:  # cancelled; its last outputs were on the way
                    continue
                if message.end:
                    self._forget(message.request_id)
                stream.push(convert.output_from_proto(message))
        raise UnavailableError("the leader ended the session")

    async def _write_commands(self, session: _Session) -> None:
        while True:
            await self._has_commands.wait()
            self._has_commands.clear()
            while self._commands:
                try:
                    async with asyncio.timeout(_WRITE_TIMEOUT_S):
                        await session.write(self._commands.popleft())
                except TimeoutError as error:
                    raise UnavailableError("the leader reads no commands") from error
                except asyncio.InvalidStateError as error:  # gRPC's, of a call that has ended
                    raise UnavailableError("the leader ended the session") from error

    async def _watch(self, stub: engine_pb2_grpc.EngineStub) -> None:
        while True:
            # A new connection does not shorten the pause.
            await asyncio.sleep(max(0.0, self._next_watch_s - time.monotonic()))
            opened_s = time.monotonic()
            call = stub.Watch(engine_pb2.WatchRequest())
            try:
                await self._follow(call)
            except _WatchError as error:
                now_s = time.monotonic()
                self._watch_pause_s = watch_pause_s(self._watch_pause_s, now_s - opened_s)
                self._next_watch_s = now_s + self._watch_pause_s
                logger.warning(
                    "replica %s: %s; watched again in %g s",
                    *(self.info.replica_id, error, self._watch_pause_s),
                )
            finally:
                self._is_watching = False
                call.cancel()
                self._leave()

    async def _time_silence(self) -> None:
        """Raise where the leader says nothing for too long.

        This event loop's own turns are counted: where it was held up itself, its leaders are not
        to blame.
        """
        before_s = time.monotonic()
        while True:
            await asyncio.sleep(self._tick_s)
            now_s = time.monotonic()
            if self._is_watching:
                self._silence.tick(now_s - before_s)
                if self._silence.is_too_long:
                    raise UnavailableError(f"no word for {self._silence.limit_s:g} s")
            before_s = now_s

    async def _follow(self, call: _Watch) -> None:
        """Apply a watch's messages.

        Raises:
            _WatchError: One is missing, or cannot be true.
            UnavailableError: There are no more.
        """
        expected_seq = 0
        self._silence.heard()
        self._is_watching = True
        async for message in call:
            self._silence.heard()
            if message.seq != expected_seq or message.is_snapshot != (expected_seq == 0):
                self._counts.num_resyncs += 1
                kind = "a snapshot" if message.is_snapshot else "a change"
                raise _WatchError(
                    f"watch message {message.seq}, {kind}, came in place of {expected_seq}"
                )
            expected_seq += 1
            self._apply(message)
        raise UnavailableError("the leader ended the watch")

    def _apply(self, message: engine_pb2.WatchResponse) -> None:
        replica_id, load = self.info.replica_id, convert.load_from_proto(message.load)
        reason = check_load(load)
        if reason is not None:
            self._counts.num_quarantines += 1
            raise _WatchError(f"quarantined, for it reports nonsense: {reason}")
        now_s = time.monotonic()
        if message.is_snapshot:
            # In this order: what is in the table has its slot in the index.
            self._index.replace(replica_id, message.added)
            self._table.add(self.info, load, now_s=now_s)
            self._is_connected = True
            self._on_change()
            return
        self._index.apply(replica_id, added=message.added, removed=message.removed)
        if message.HasField("load") and self._table.on_load(replica_id, load, now_s=now_s):
            self._on_change()


class _WatchError(Exception):
    """What a leader's watch says cannot be used."""


def watch_pause_s(last_s: float, kept_s: float) -> float:
    """Return how long to wait before a leader whose watch went wrong is watched again, seconds.

    Args:
        last_s: The pause before that watch.
        kept_s: So long it went well; after a good while the pauses begin anew.
    """
    if kept_s >= _MAX_WATCH_PAUSE_S:
        last_s = 0.0
    return min(max(_MIN_WATCH_PAUSE_S, 2 * last_s), _MAX_WATCH_PAUSE_S)


_Session = grpc.aio.StreamStreamCall[engine_pb2.SessionRequest, engine_pb2.SessionResponse]
_Watch = grpc.aio.UnaryStreamCall[engine_pb2.WatchRequest, engine_pb2.WatchResponse]


def _reason(group: BaseExceptionGroup[BaseException]) -> str:
    """Return the first cause, in one line."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
