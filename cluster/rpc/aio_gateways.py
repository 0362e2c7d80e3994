"""Calls to the gateways of a cluster from an asyncio program."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator

import grpc

from cluster.errors import CancelledError
from cluster.rpc.connection import CHANNEL_OPTIONS, Access, Stub, call_failures, may_ask_next
from cluster.rpc.failure import CallFailure
from cluster.rpc.public import Event
from cluster.rpc.queries import Answer, Query
from cluster.rpc.resuming_stream import ResumingStream
from cluster.rpc.stream_query import StreamQuery


class AioGateways:
    """`Gateways`, with coroutines; of one loop.

    Args:
        access: How to reach them.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._addresses = access.addresses
        self._channels: dict[int, grpc.aio.Channel] = {}
        self._stubs: dict[int, Stub] = {}
        self._is_closed = False
        self._rng = random.Random()

    async def close(self) -> None:
        """Close all connections; calls under way end, and streams that wait to go on."""
        self._is_closed = True
        await asyncio.gather(*(channel.close(None) for channel in self._channels.values()))

    async def ask(self, query: Query[Answer]) -> Answer:
        """Return the answer of the first gateway that answers; see `Gateways.ask`."""
        deadline_s = time.monotonic() + query.timeout_s
        turns = self._addresses.in_turn()
        while True:
            try:
                return await self._ask(turns.pop(0), query, deadline_s)
            except CallFailure as failure:
                if not (turns and may_ask_next(failure, query)):
                    raise failure.error from failure

    async def _ask(self, index: int, query: Query[Answer], deadline_s: float) -> Answer:
        with call_failures():
            answer = await getattr(self._stub(index), query.method)(
                query.request,
                timeout=deadline_s - time.monotonic(),
                metadata=self._access.metadata,
            )
        self._addresses.answered(index)
        return query.read(answer)

    async def stream(self, query: StreamQuery) -> AsyncGenerator[Event, None]:
        """Yield the events of a stream, over as many calls as it takes; see `Gateways.stream`."""
        stream = ResumingStream(query, self._addresses, self._rng, time.monotonic())
        while not stream.is_finished:
            call = stream.next_call(time.monotonic())
            try:
                with call_failures():
                    messages = getattr(self._stub(call.index), call.method)(
                        call.request, timeout=call.timeout_s, metadata=self._access.metadata
                    )
                    try:
                        async for message in messages:
                            for event in stream.read(message, time.monotonic()):
                                yield event
                    finally:
                        messages.cancel()
                    stream.check_end()
            except CallFailure as failure:
                if self._is_closed:
                    raise failure.error from failure
                await asyncio.sleep(stream.broken(failure, time.monotonic()))

    def _stub(self, index: int) -> Stub:
        if self._is_closed:
            raise CancelledError("the client is closed: make another one")
        if index not in self._stubs:
            self._channels[index] = channel = self._connect(self._addresses[index])
            self._stubs[index] = Stub(channel)
        return self._stubs[index]

    def _connect(self, address: str) -> grpc.aio.Channel:
        credentials = self._access.credentials
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
