"""The six methods of sluice.v1.Inference."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc

from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.gateway import validation
from cluster.gateway.explain import check_visible, explanation_to_proto
from cluster.gateway.generation import ClientCall, GatewayParts
from cluster.gateway.identity import Caller, caller_of
from cluster.gateway.intake import limits_of, serve_request
from cluster.gateway.status import ending
from cluster.gateway.tiers import tiers_to_proto
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import ReplicaInfo, ReplicaSnapshot

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer:
    """Serves clients; every method authenticates, and ends with an answer or a status."""

    def __init__(self, parts: GatewayParts) -> None:
        self._parts = parts

    async def GenerateStream(
        self, request: inference_pb2.GenerateStreamRequest, context: _Context
    ) -> None:
        """Answer with events."""
        message = request.request
        request_id = self._request_id(message)
        async with self._ending(context, request_id):
            await self._serve(message, request_id, context, context.write)

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
            await self._serve(request, response.request_id, context, collect)
        response.text = "".join(pieces)
        return response

    async def _serve(
        self,
        message: inference_pb2.GenerateRequest,
        request_id: str,
        context: _Context,
        send: Callable[[inference_pb2.GenerateStreamResponse], Awaitable[None]],
    ) -> None:
        arrival_s = time.monotonic()
        caller = self._caller(context)
        metadata = context.invocation_metadata() or ()
        with self._parts.tracing.request(metadata, request_id, caller) as span:
            call = ClientCall(request_id, remaining_of(context), send, span, arrival_s)
            await serve_request(self._parts, message, call, caller)

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

    async def Resume(self, request: inference_pb2.ResumeRequest, context: _Context) -> None:
        """Go on with a stream that was cut off."""
        async with self._ending(context, request.request_id):
            raise UnavailableError("Resume is not there yet")

    async def DrainReplica(
        self, request: inference_pb2.DrainReplicaRequest, context: _Context
    ) -> inference_pb2.DrainReplicaResponse:
        """Make a replica leave."""
        async with ending(context, "-"):
            raise UnavailableError("DrainReplica is not there yet")
        return inference_pb2.DrainReplicaResponse()

    def _request_id(self, message: inference_pb2.GenerateRequest) -> str:
        return message.request_id or uuid.UUID(int=self._parts.rng.getrandbits(128)).hex

    def _caller(self, context: _Context) -> Caller:
        return caller_of(self._parts.authenticator, context)

    def _ending(self, context: _Context, request_id: str) -> AbstractAsyncContextManager[None]:
        count = self._parts.metrics.requests
        return ending(context, request_id, lambda code: count.labels(code).inc())


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
