"""Streams of two gateways that share a store and their leaders."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from gateway_fakes import FakeLeader, Stage, eventually, stage
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.clock import WallClock
from cluster.config import StoreConfig
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.store import Store
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

Metadata = Sequence[tuple[str, str | bytes]]


@asynccontextmanager
async def two_gateways(
    *leaders: FakeLeader, store: Store | None = None, **gateway: Any
) -> AsyncIterator[tuple[Stage, Stage]]:
    """Run two gateways; what a test left running is ended."""
    shared = store or EmbeddedStore(StoreConfig(), clock=WallClock())
    async with (
        stage(store=shared, gateway_id="gateway-1", **gateway) as first,
        stage(store=shared, gateway_id="gateway-2", **gateway) as second,
    ):
        for leader in leaders:
            await first.add(leader)
        known = [leader.replica_id for leader in leaders]
        await eventually(lambda: second.routed_to == known)
        yield first, second


@asynccontextmanager
async def connected(running: Stage) -> AsyncIterator[InferenceStub]:
    """Connect to a gateway as nobody else does."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(running.address, options=options) as channel:
        yield InferenceStub(channel)


@dataclass
class Received:
    """What a client has of one answer, from all of its calls."""

    seqs: list[int]
    token_ids: list[int]
    text: str = ""
    finished: pb.Finished | None = None

    def take(self, event: pb.GenerateStreamResponse) -> None:
        """Take an event."""
        assert self.finished is None, "an event after the last one"
        self.seqs.append(event.seq)
        self.token_ids.extend(event.delta.token_ids)
        self.text += event.delta.text
        if event.HasField("finished"):
            self.finished = event.finished


def nothing() -> Received:
    """Return what a client has before its first call."""
    return Received([], [])


def begin(
    stub: InferenceStub,
    request_id: str = "r",
    *,
    max_tokens: int = 40,
    detach_s: float = 0.0,
    metadata: Metadata = (),
    timeout_s: float = 20.0,
    **fields: Any,
) -> Any:
    """Begin a stream; return its call."""
    request = pb.GenerateRequest(
        request_id=request_id,
        token_ids=pb.TokenIds(ids=[1, 2, 3]),
        sampling=pb.SamplingParams(max_tokens=max_tokens, seed=7),
        **fields,
    )
    message = pb.GenerateStreamRequest(request=request, detach_on_disconnect_s=detach_s)
    return stub.GenerateStream(message, metadata=list(metadata), timeout=timeout_s)


def resume(
    stub: InferenceStub,
    received: Received,
    request_id: str = "r",
    *,
    has_tokens: bool = True,
    detach_s: float = 0.0,
    metadata: Metadata = (),
    timeout_s: float = 20.0,
) -> Any:
    """Go on with a stream; return its call."""
    message = pb.ResumeRequest(
        request_id=request_id,
        after_seq=received.seqs[-1] if received.seqs else None,
        tokens_received=received.token_ids if has_tokens else (),
        detach_on_disconnect_s=detach_s,
    )
    return stub.Resume(message, metadata=list(metadata), timeout=timeout_s)


async def read(call: Any, received: Received, num_tokens: int = 10**9) -> Received:
    """Take a call's events, until the client has so many tokens or the answer is complete."""
    while len(received.token_ids) < num_tokens:
        message = await call.read()
        if message is grpc.aio.EOF:
            await call.code()
            break
        received.take(message.event if isinstance(message, pb.ResumeResponse) else message)
    return received


async def refusal(call: Any, received: Received | None = None) -> tuple[str, str, str]:
    """Return code, reason and message of a call that fails."""
    try:
        await read(call, received or nothing())
    except grpc.aio.AioRpcError as error:
        info = error_details_pb2.ErrorInfo()
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():  # none where nobody answered
            detail.Unpack(info)
        return error.code().name, info.reason, error.details() or ""
    raise AssertionError("the call did not fail")
