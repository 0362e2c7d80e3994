"""The methods of sluice.v1.Inference."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
from google.protobuf.message import Message

from cluster.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError
from cluster.gateway import validation
from cluster.gateway.detached import DetachedRequests, Send, check_detach, counted_from_now
from cluster.gateway.explain import check_visible, explanation_to_proto
from cluster.gateway.identity import Caller, caller_of
from cluster.gateway.intake import limits_of, serve_request
from cluster.gateway.parts import ClientCall, GatewayParts
from cluster.gateway.resume import Resumer
from cluster.gateway.status import ending
from cluster.gateway.tiers import tiers_to_proto
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import ReplicaInfo, ReplicaSnapshot

logger = logging.getLogger(__name__)

_DRAIN_TIMEOUT_S = 5.0  # for a leader to say that it drains
_WRITE_TIMEOUT_S = 1.0  # of a message that fits into any buffer

_Context = grpc.aio.ServicerContext[Any, Any]
_Carry = Callable[[ClientCall, Caller], Awaitable[None]]


class InferenceServicer:
    """Serves clients; every method authenticates, and ends with an answer or a status.

    Args:
        parts: Of the gateway.
        resumer: Goes on with requests.
        detached: Keeps those that outlive their calls.
    """

    def __init__(self, parts: GatewayParts, resumer: Resumer, detached: DetachedRequests) -> None:
        self._parts = parts
        self._resumer = resumer
        self._detached = detached

    async def GenerateStream(
        self, request: inference_pb2.GenerateStreamRequest, context: _Context
    ) -> None:
        """Answer with events."""
        message = request.request
        request_id = self._request_id(message)
        async with self._ending(context, request_id):
            detach_s = request.detach_on_disconnect_s
            await self._serve(self._begin(message), request_id, context, _writer(context), detach_s)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> inference_pb2.GenerateResponse:
        """Answer with the whole completion."""
        response = inference_pb2.GenerateResponse(request_id=self._request_id(request))
        pieces: list[str] = []

        async def collect(event: inference_pb2.GenerateStreamResponse) -> None:
            if event.HasField("delta"):
                pieces.append(event.delta.text)
                response.token_ids.extend(event.delta.token_ids)
                response.logprobs.extend(event.delta.logprobs)
            elif event.HasField("finished"):
                response.finish_reason = event.finished.finish_reason
                response.usage.CopyFrom(event.finished.usage)
                response.timings.CopyFrom(event.finished.timings)

        async with self._ending(context, response.request_id):
            await self._serve(self._begin(request), response.request_id, context, collect)
        response.text = "".join(pieces)
        return response

    async def Resume(self, request: inference_pb2.ResumeRequest, context: _Context) -> None:
        """Go on with a stream that was cut off."""

        async def carry(call: ClientCall, caller: Caller) -> None:
            await self._resumer.serve(request, call, caller)

        write = _writer(context)

        async def send(event: inference_pb2.GenerateStreamResponse) -> None:
            await write(inference_pb2.ResumeResponse(event=event))

        async with self._ending(context, request.request_id):
            detach_s = request.detach_on_disconnect_s
            await self._serve(carry, request.request_id, context, send, detach_s)

    def _begin(self, message: inference_pb2.GenerateRequest) -> _Carry:
        async def carry(call: ClientCall, caller: Caller) -> None:
            await serve_request(self._parts, message, call, caller)

        return carry

    async def _serve(
        self, carry: _Carry, request_id: str, context: _Context, send: Send, detach_s: float = 0.0
    ) -> None:
        """Carry a request to its end, in a task of its own where it may outlive the call."""
        arrival_s = time.monotonic()
        caller = self._caller(context)
        check_detach(detach_s, self._parts.config.gateway)
        metadata = context.invocation_metadata() or ()
        remaining_s = remaining_of(context)
        if detach_s:
            remaining_s = counted_from_now(remaining_s())

        async def work(send: Send) -> None:
            with self._parts.tracing.request(metadata, request_id, caller) as span:
                await carry(ClientCall(request_id, remaining_s, send, span, arrival_s), caller)

        if detach_s:
            await self._detached.serve(work, send, detach_s, request_id)
        else:
            await work(send)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        """Answer with the token ids of a text."""
        async with self._ending(context, "-"):
            self._caller(context)
            limits = limits_of(self._parts)
            validation.check_model(request.model, limits)
            if not request.text:
                raise InvalidArgumentError(
                    "text is empty: give at least one character", field="text"
                )
            token_ids = await self._parts.tokenizer.encode(request.text)
        return inference_pb2.TokenizeResponse(
            token_ids=token_ids, max_model_len=limits.max_model_len
        )

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: _Context
    ) -> inference_pb2.ListModelsResponse:
        """Answer with the one model of this cluster."""
        async with ending(context, "-"):
            self._caller(context)
            limits = limits_of(self._parts)
            model = inference_pb2.Model(
                name=limits.model, max_model_len=limits.max_model_len, vocab_size=limits.vocab_size
            )
        return inference_pb2.ListModelsResponse(models=[model])

    async def ClusterStatus(
        self, request: inference_pb2.ClusterStatusRequest, context: _Context
    ) -> inference_pb2.ClusterStatusResponse:
        """Answer with what this gateway knows of the replica groups."""
        async with ending(context, "-"):
            self._caller(context)
            fleet, num_queued = self._parts.fleet, self._parts.dispatcher.num_queued
            known = {snapshot.info.replica_id: snapshot for snapshot in fleet.table.snapshots()}
            return inference_pb2.ClusterStatusResponse(
                replicas=[
                    _replica_status(
                        link.info,
                        known.get(link.info.replica_id),
                        fleet.index.num_blocks(link.info.replica_id),
                    )
                    for link in fleet.links
                ],
                num_queued=num_queued,
                num_inflight=self._parts.admission.num_inflight - num_queued,
                gateway_id=self._parts.gateway_id,
            )

    async def Explain(
        self, request: inference_pb2.ExplainRequest, context: _Context
    ) -> inference_pb2.ExplainResponse:
        """Answer with why a request went where it went."""
        async with ending(context, "-"):
            caller = self._caller(context)
            validation.check_request_id(request.request_id)
            found = self._parts.dispatcher.explain(request.request_id)
            return explanation_to_proto(
                check_visible(found, request.request_id, caller),
                policy=self._parts.config.router.policy,
                now_s=time.monotonic(),
            )

    async def DrainReplica(
        self, request: inference_pb2.DrainReplicaRequest, context: _Context
    ) -> inference_pb2.DrainReplicaResponse:
        """Make a replica leave."""
        async with ending(context, "-"):
            caller = self._caller(context)
            if not caller.is_admin:
                raise PermissionDeniedError(
                    f"tenant {caller.tenant!r} is no administrator: ask one to drain the replica"
                )
            link = self._parts.fleet.link(request.replica_id)
            if link is None:
                raise NotFoundError(
                    f"replica_id={request.replica_id[:100]!r} is none that this gateway knows: "
                    "ClusterStatus lists them"
                )
            logger.info(
                "replica %s drains, tenant %r asks for it", link.info.replica_id, caller.tenant
            )
            num_requests = await link.drain(_DRAIN_TIMEOUT_S)
        return inference_pb2.DrainReplicaResponse(num_requests=num_requests)

    def _request_id(self, message: inference_pb2.GenerateRequest) -> str:
        return message.request_id or uuid.UUID(int=self._parts.rng.getrandbits(128)).hex

    def _caller(self, context: _Context) -> Caller:
        return caller_of(self._parts.authenticator, context)

    def _ending(self, context: _Context, request_id: str) -> AbstractAsyncContextManager[None]:
        count = self._parts.metrics.requests
        return ending(context, request_id, lambda code: count.labels(code).inc())


def _writer(context: _Context) -> Callable[[Message], Awaitable[None]]:
    """Return what sends messages so that a call which is stopped meanwhile still gets its status.

    The first message takes the headers along. Were it cancelled on its way, grpc.aio would not know
    that they have gone, fail to send the status with them once more, and leave the client waiting.
    """
    has_headers = False

    async def write(message: Message) -> None:
        nonlocal has_headers
        if has_headers:
            await context.write(message)
            return
        first = asyncio.ensure_future(context.write(message))
        try:
            await asyncio.shield(first)
        except asyncio.CancelledError:
            await asyncio.wait([first], timeout=_WRITE_TIMEOUT_S)
            # Where the client has gone it has failed, of which nobody else wants to know.
            first.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise
        has_headers = True

    return write


def remaining_of(context: _Context) -> Callable[[], float | None]:
    """Return what tells the seconds to a call's deadline; None is no bound."""

    def remaining_s() -> float | None:
        seconds: float | None = context.time_remaining()
        return None if seconds is None or math.isinf(seconds) else seconds

    return remaining_s


def _replica_status(
    info: ReplicaInfo, snapshot: ReplicaSnapshot | None, num_indexed_blocks: int
) -> inference_pb2.ReplicaStatus:
    status = inference_pb2.ReplicaStatus(
        replica_id=info.replica_id,
        state=inference_pb2.REPLICA_STATE_CONNECTING,
        model=info.model,
        tp=info.tp,
        pp=info.pp,
        num_indexed_blocks=num_indexed_blocks,
        leader_pid=info.pid,
        address=info.address,
    )
    if snapshot is not None:
        load = snapshot.load
        status.state = (
            inference_pb2.REPLICA_STATE_DRAINING
            if load.is_draining
            else inference_pb2.REPLICA_STATE_READY
        )
        status.num_blocks = load.num_blocks
        status.num_free_blocks = load.num_free_blocks
        status.num_running = load.num_running
        status.num_waiting = load.num_waiting
        status.num_prefix_query_tokens = load.num_prefix_query_tokens
        status.num_prefix_hit_tokens = load.num_prefix_hit_tokens
        status.num_generated_tokens = load.num_generated_tokens
        status.cache.CopyFrom(tiers_to_proto(load.cache))
    return status
