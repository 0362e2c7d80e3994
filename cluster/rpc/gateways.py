"""Calls to the gateways of a cluster from a plain program."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Generator

import grpc

from cluster.errors import CancelledError
from cluster.rpc.connection import CHANNEL_OPTIONS, Access, Stub, call_failures, may_ask_next
from cluster.rpc.failure import CallFailure
from cluster.rpc.public import Event
from cluster.rpc.queries import Answer, Query
from cluster.rpc.resuming_stream import ResumingStream
from cluster.rpc.stream_query import StreamQuery


class Gateways:
    """One channel to each gateway, made when it is first used; threads may share them.

    Args:
        access: How to reach them.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._addresses = access.addresses
        self._channels: dict[int, grpc.Channel] = {}
        self._stubs: dict[int, Stub] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._rng = random.Random()

    def close(self) -> None:
        """Close all connections; calls under way end, and streams that wait to go on."""
        with self._lock:
            self._closed.set()
            for channel in self._channels.values():
                channel.close()

    def ask(self, query: Query[Answer]) -> Answer:
        """Return the answer of the first gateway that answers.

        Raises:
            SluiceError: As the gateway says, or none is in reach.
        """
        deadline_s = time.monotonic() + query.timeout_s
        turns = self._addresses.in_turn()
        while True:
            try:
                return self._ask(turns.pop(0), query, deadline_s)
            except CallFailure as failure:
                if not (turns and may_ask_next(failure, query)):
                    raise failure.error from failure

    def _ask(self, index: int, query: Query[Answer], deadline_s: float) -> Answer:
        with call_failures():
            answer = getattr(self._stub(index), query.method)(
                query.request,
                timeout=deadline_s - time.monotonic(),
                metadata=self._access.metadata,
            )
        self._addresses.answered(index)
        return query.read(answer)

    def stream(self, query: StreamQuery) -> Generator[Event, None, None]:
        """Yield the events of a stream, over as many calls as it takes.

        Raises:
            SluiceError: As a gateway says, or the stream could not go on.
        """
        stream = ResumingStream(query, self._addresses, self._rng, time.monotonic())
        while not stream.is_finished:
            try:
                with call_failures():
                    yield from self._events(stream)
            except CallFailure as failure:
                if self._closed.wait(stream.broken(failure, time.monotonic())):
                    raise failure.error from failure

    def _events(self, stream: ResumingStream) -> Generator[Event, None, None]:
        call = stream.next_call(time.monotonic())
        messages = getattr(self._stub(call.index), call.method)(
            call.request, timeout=call.timeout_s, metadata=self._access.metadata
        )
        try:
            for message in messages:
                yield from stream.read(message, time.monotonic())
        finally:
            messages.cancel()
        stream.check_end()

    def _stub(self, index: int) -> Stub:
        with self._lock:
            if self._closed.is_set():
                raise CancelledError("the client is closed: make another one")
            if index not in self._stubs:
                self._channels[index] = channel = self._connect(self._addresses[index])
                self._stubs[index] = Stub(channel)
            return self._stubs[index]

    def _connect(self, address: str) -> grpc.Channel:
        credentials = self._access.credentials
        if credentials is None:
            return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
