"""Gateways that share a journal and end each call as a script says."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc

from cluster.client import Event, TextDelta
from cluster.errors import (
    FailedPreconditionError,
    NotFoundError,
    SluiceError,
)
from cluster.gateway.status import status_of
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1 import inference_pb2_grpc
from tests.client.client_fakes import FINISHED

NUM_TOKENS = 12
TOKENS = tuple(range(100, 100 + NUM_TOKENS))
# Every third token's text is held back and comes with the next one.
PIECES = ["" if index % 3 == 1 else f"<{index}>" * (1 + (index % 3 == 2)) for index in range(12)]
TEXT = "".join(PIECES)


def events_from(
    next_seq: int, num_received: int, chunk_tokens: int
) -> Iterator[pb.GenerateStreamResponse]:
    """Return what follows behind a position, in deltas of so many tokens."""

    def event(**kind: Any) -> pb.GenerateStreamResponse:
        nonlocal next_seq
        next_seq += 1
        return pb.GenerateStreamResponse(seq=next_seq - 1, **kind)

    if not next_seq:
        yield event(queued=pb.Queued(position=0))
    yield event(running=pb.Running(replica_id="a"))
    for first in range(num_received, NUM_TOKENS, chunk_tokens):
        part = slice(first, first + chunk_tokens)
        delta = pb.TokenDelta(text="".join(PIECES[part]), token_ids=TOKENS[part])
        yield event(delta=delta)
    yield event(finished=FINISHED)


def tokens_of(events: list[Event]) -> tuple[int, ...]:
    return tuple(i for event in events if isinstance(event, TextDelta) for i in event.token_ids)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


@dataclass
class Fate:
    """How one call ends."""

    num_events: int = 99  # sent before; more than there are is all of them
    error: SluiceError | None = None  # a gateway's status
    code: grpc.StatusCode | None = None  # a status of something on the way
    is_stopped: bool = False  # the gateway's server stops
    skips: int = 0  # events left out before the last that is sent; -1: it comes twice
    is_journalled: bool = True


@dataclass
class Call:
    """What a gateway was asked."""

    gateway: int
    method: str
    request: Any
    details: dict[str, str]


@dataclass
class Script:
    """What the gateways have in common."""

    fates: list[Fate]  # of the calls in order; those behind are answered in full
    calls: list[Call] = field(default_factory=list)
    journalled: set[str] = field(default_factory=set)

    @property
    def ways(self) -> list[tuple[int, str]]:
        """Gateway and method of each call."""
        return [(call.gateway, call.method) for call in self.calls]


class ScriptedGateway(inference_pb2_grpc.InferenceServicer):
    """One of them."""

    def __init__(self, script: Script, index: int) -> None:
        self.script = script
        self.index = index
        self.server: grpc.Server | None = None
        self.ended = threading.Event()

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        fate = self._begin("GenerateStream", request, context)
        if fate.is_journalled:
            self.script.journalled.add(request.request.request_id)
        yield from self._play(fate, 0, 0, context)

    def Resume(self, request: Any, context: Any) -> Iterator[Any]:
        fate = self._begin("Resume", request, context)
        if fate.error is None and request.request_id not in self.script.journalled:
            fate = Fate(0, NotFoundError(f"request {request.request_id!r} is unknown"))
        received = tuple(request.tokens_received)
        if received != TOKENS[: len(received)]:
            fate = Fate(0, FailedPreconditionError("tokens_received contradicts the journal"))
        next_seq = request.after_seq + 1 if request.HasField("after_seq") else 0
        for event in self._play(fate, next_seq, len(received), context):
            yield pb.ResumeResponse(event=event)

    def ListModels(self, request: Any, context: Any) -> Any:
        self._answer("ListModels", request, context)
        return pb.ListModelsResponse()

    def DrainReplica(self, request: Any, context: Any) -> Any:
        self._answer("DrainReplica", request, context)
        return pb.DrainReplicaResponse(num_requests=3)

    def _begin(self, method: str, request: Any, context: Any) -> Fate:
        metadata = dict(context.invocation_metadata())
        self.script.calls.append(Call(self.index, method, request, metadata))
        context.add_callback(self.ended.set)
        return self.script.fates.pop(0) if self.script.fates else Fate()

    def _answer(self, method: str, request: Any, context: Any) -> None:
        self._end(self._begin(method, request, context), context)

    def _play(self, fate: Fate, next_seq: int, num_received: int, context: Any) -> Iterator[Any]:
        chunk_tokens = 1 + len(self.script.calls) % 3  # another engine step, other deltas
        events = list(events_from(next_seq, num_received, chunk_tokens))[: fate.num_events]
        if fate.skips > 0:
            del events[-1 - fate.skips : -1]
        elif fate.skips < 0:
            events.append(events[-1])
        yield from events
        self._end(fate, context)

    def _end(self, fate: Fate, context: Any) -> None:
        if fate.is_stopped:
            assert self.server is not None
            self.server.stop(None)
            self.ended.wait(10)
        elif fate.error is not None:
            status = status_of(fate.error)
            details = ("grpc-status-details-bin", status.SerializeToString())
            context.set_trailing_metadata((details,))
            context.abort(grpc.StatusCode[fate.error.code], status.message)
        elif fate.code is not None:
            context.abort(fate.code, "Stream removed")


@contextlib.contextmanager
def gateways(
    *fates: Fate, num_gateways: int = 2, kind: type[ScriptedGateway] = ScriptedGateway
) -> Iterator[tuple[list[str], Script]]:
    """Serve on free ports; yields the addresses, and what the gateways have in common."""
    script = Script(list(fates))
    addresses, servicers = [], []
    for index in range(num_gateways):
        servicer = kind(script, index)
        server = servicer.server = grpc.server(futures.ThreadPoolExecutor(4))
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
        addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        server.start()
        servicers.append(servicer)
    try:
        yield addresses, script
    finally:
        for servicer in servicers:
            servicer.ended.set()
            assert servicer.server is not None
            servicer.server.stop(None).wait(5)
