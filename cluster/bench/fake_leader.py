"""A leader whose engine makes tokens from nothing: what is left to measure is the way there.

It speaks the real internal service. Like a real engine it answers all requests of a session with
one message per step; a step comes at a fixed pace, or as fast as the session takes it. The first
token of a request does not wait for a step, so that its TTFT is the way's alone.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import grpc

from cluster.rpc.sluice.internal.v1 import engine_pb2 as pb
from cluster.rpc.sluice.internal.v1.engine_pb2_grpc import (
    EngineServicer,
    add_EngineServicer_to_server,
)

NUM_BLOCKS = 1 << 20
_LOAD_INTERVAL_S = 0.1
_IDLE_LOOK_S = 0.1  # a session without requests looks this often whether its gateway is still there
_MAX_RECORDED_TOKENS = 1 << 20  # 8 MiB of times
_TOKEN_IDS = range(64, 1024)  # behind the special tokens, and within any vocabulary


@dataclass(slots=True)
class Pace:
    """How fast the fake engine steps, and when paced tokens left it."""

    step_s: float = 0.0  # duration of a step; 0: as fast as sessions take it
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    sent_s: dict[int, array[float]] = field(default_factory=dict)  # by seed, `time.monotonic`
    num_sent: int = 0  # times in `sent_s`

    def set(self, step_s: float) -> None:
        """Change the duration of a step, and forget the times."""
        self.step_s = step_s
        self.sent_s.clear()
        self.num_sent = 0
        self.changed.set()

    def record(self, requests: Iterable[_Request]) -> None:
        """Note that a token of each leaves now, where a pace is set and there is room."""
        if not self.step_s or self.num_sent >= _MAX_RECORDED_TOKENS:
            return
        now_s = time.monotonic()
        for request in requests:
            self.sent_s.setdefault(request.seed, array("d")).append(now_s)
            self.num_sent += 1


@dataclass(slots=True)
class _Request:
    request_id: str  # the gateway's own
    seed: int  # the client's: what both ends know a request by
    num_left: int
    num_done: int = 0

    def next_output(self) -> pb.Output:
        """Return the next token, and the end with the last one."""
        token_id = _TOKEN_IDS[self.num_done % len(_TOKEN_IDS)]
        self.num_done += 1
        self.num_left -= 1
        end = pb.END_UNSPECIFIED if self.num_left else pb.END_LENGTH
        return pb.Output(request_id=self.request_id, token_ids=[token_id], end=end)


class _Session:
    """The requests of one gateway."""

    def __init__(self, context: Any, pace: Pace) -> None:
        self.running: dict[str, _Request] = {}
        self._context = context
        self._pace = pace
        self._has_work = asyncio.Event()
        self._writing = asyncio.Lock()  # gRPC takes one message of a stream at a time

    async def take(self, commands: AsyncIterator[pb.SessionRequest]) -> None:
        """Begin and cancel requests until the gateway ends the stream."""
        async for command in commands:
            if command.WhichOneof("command") == "cancel":
                request_id = command.cancel.request_id
                if self.running.pop(request_id, None) is not None:
                    await self._write([pb.Output(request_id=request_id, end=pb.END_CANCELLED)])
                continue
            submit = command.submit
            sampling = submit.sampling
            request = _Request(submit.request_id, sampling.seed, sampling.max_tokens)
            await self._advance([request])
            if request.num_left:
                self.running[request.request_id] = request
                self._has_work.set()

    async def step_until(self, commands: asyncio.Task[None]) -> None:
        """Step at the pace while requests run, until no more commands come."""
        due_s = time.monotonic()
        while not commands.done():
            if not self.running:
                await _wait(self._has_work, _IDLE_LOOK_S)
            elif self._pace.step_s:
                due_s = max(due_s + self._pace.step_s, time.monotonic())
                await _wait(self._pace.changed, due_s - time.monotonic())
            await self._advance(list(self.running.values()))

    async def _advance(self, requests: list[_Request]) -> None:
        async with self._writing:
            going = [request for request in requests if request.num_left]
            self._pace.record(going)
            outputs = [request.next_output() for request in going]
            for output in outputs:
                if output.end != pb.END_UNSPECIFIED:
                    self.running.pop(output.request_id, None)
            if outputs:
                await self._context.write(pb.SessionResponse(outputs=outputs))

    async def _write(self, outputs: list[pb.Output]) -> None:
        async with self._writing:
            await self._context.write(pb.SessionResponse(outputs=outputs))


class FakeLeader(EngineServicer):
    """The internal service of a replica that has no model.

    Args:
        pace: Of its steps; may be changed while it serves.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._sessions: list[_Session] = []

    async def Session(self, request_iterator: Any, context: Any) -> None:
        """Answer every request of one gateway."""
        session = _Session(context, self._pace)
        self._sessions.append(session)
        commands = asyncio.create_task(session.take(request_iterator))
        try:
            await session.step_until(commands)
            await commands  # raises what ended it, if it did not end well
        finally:
            commands.cancel()
            self._sessions.remove(session)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> None:
        """Report an empty cache and the load, ten times a second."""
        for seq in count():
            load = pb.Load(
                num_running=sum(len(session.running) for session in self._sessions),
                num_blocks=NUM_BLOCKS,
                num_free_blocks=NUM_BLOCKS,
            )
            await context.write(pb.WatchResponse(seq=seq, is_snapshot=seq == 0, load=load))
            await asyncio.sleep(_LOAD_INTERVAL_S)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for the event or the time, and reset the event."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
    event.clear()


async def start_fake_leader(leader: FakeLeader) -> tuple[grpc.aio.Server, str]:
    """Return a running server and its address, on a free port of the loopback interface."""
    server = grpc.aio.server()
    add_EngineServicer_to_server(leader, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"
