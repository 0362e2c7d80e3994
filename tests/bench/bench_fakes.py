"""A server of the public API without a cluster: each request ends as it is told to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import (
    InferenceServicer,
    add_InferenceServicer_to_server,
)

NUM_CACHED = 3
RETRY_AFTER_S = 2.5


def refuse(context: Any, *, has_details: bool) -> None:
    """End a call as a full gateway does, or as something on the way to it."""
    message = "queue is full: come back later"
    if has_details:
        status = Status(code=8, message=message)
        delay = Duration()
        delay.FromNanoseconds(int(RETRY_AFTER_S * 1e9))
        for detail in (
            error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="sluice"),
            error_details_pb2.RetryInfo(retry_delay=delay),
        ):
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)


def logprobs_of(sampling: pb.SamplingParams, index: int) -> list[pb.PositionLogprobs]:
    """Return what a request that asks for log probabilities gets at one position."""
    if not sampling.HasField("logprobs"):
        return []
    chosen = pb.TokenLogprob(token_id=index, logprob=-0.25, text=f"t{index} ")
    top = [chosen, pb.TokenLogprob(token_id=99, logprob=-1.5, text="[x]")]
    return [pb.PositionLogprobs(chosen=chosen, top=top[: sampling.logprobs])]


class FakeInference(InferenceServicer):
    """Answers request n as `outcomes[n]` says: ok, queue, refuse, shed, truncate, short, break."""

    def __init__(self, outcomes: Sequence[str], delay_s: float = 0.0) -> None:
        self.prompts: list[list[int] | str] = []
        self.requests: list[pb.GenerateRequest] = []
        self.max_num_open = 0
        self.explanation: pb.ExplainResponse | None = None
        self._num_open = 0
        self._outcomes = iter(outcomes)
        self._delay_s = delay_s
        self._lock = threading.Lock()

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        model = pb.Model(name="fake", max_model_len=512, vocab_size=300)
        return pb.ListModelsResponse(models=[model])

    def ClusterStatus(
        self, request: pb.ClusterStatusRequest, context: Any
    ) -> pb.ClusterStatusResponse:
        replica = pb.ReplicaStatus(
            replica_id="r1",
            state=pb.REPLICA_STATE_READY,
            model="fake",
            tp=2,
            pp=1,
            num_blocks=100,
            num_free_blocks=75,
            num_running=3,
            num_waiting=1,
            num_prefix_query_tokens=400,
            num_prefix_hit_tokens=100,
            num_generated_tokens=1234,
        )
        return pb.ClusterStatusResponse(replicas=[replica], num_inflight=4, gateway_id="g1")

    def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        if self.explanation is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{request.request_id} is not remembered")
        return self.explanation

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        num_tokens = request.sampling.max_tokens
        self.requests.append(request)
        return pb.GenerateResponse(
            text="".join(f"t{index} " for index in range(num_tokens)),
            token_ids=range(num_tokens),
            logprobs=[p for i in range(num_tokens) for p in logprobs_of(request.sampling, i)],
            finish_reason=pb.FINISH_REASON_LENGTH,
        )

    def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Any
    ) -> Iterator[pb.GenerateStreamResponse]:
        asked = request.request
        with self._lock:
            outcome = next(self._outcomes)
            self.requests.append(asked)
            self.prompts.append(asked.text or list(asked.token_ids.ids))
            self._num_open += 1
            self.max_num_open = max(self.max_num_open, self._num_open)
        try:
            if outcome in ("refuse", "shed"):
                refuse(context, has_details=outcome == "refuse")
            time.sleep(self._delay_s)
            yield from self._events(asked, outcome, context)
        finally:
            with self._lock:
                self._num_open -= 1

    def _events(
        self, asked: pb.GenerateRequest, outcome: str, context: Any
    ) -> Iterator[pb.GenerateStreamResponse]:
        seqs = count()

        def event(**kind: Any) -> pb.GenerateStreamResponse:
            return pb.GenerateStreamResponse(request_id="q", seq=next(seqs), **kind)

        num_tokens = asked.sampling.max_tokens
        if outcome == "queue":
            yield event(queued=pb.Queued(position=3, estimate_s=1.25))
            yield event(queued=pb.Queued(position=0))
        yield event(running=pb.Running(replica_id="r1"))
        for index in range(num_tokens - (outcome == "short")):
            logprobs = logprobs_of(asked.sampling, index)
            delta = pb.TokenDelta(text=f"t{index} ", token_ids=[index], logprobs=logprobs)
            yield event(delta=delta)
        if outcome == "break":
            context.abort(grpc.StatusCode.UNAVAILABLE, "the replica died")
        if outcome == "truncate":
            return
        usage = pb.Usage(prompt_tokens=12, completion_tokens=num_tokens, cached_tokens=NUM_CACHED)
        ended = pb.Finished(finish_reason=pb.FINISH_REASON_LENGTH, usage=usage)
        yield event(finished=ended)


@contextlib.contextmanager
def serving(
    fake: FakeInference, credentials: grpc.ServerCredentials | None = None
) -> Iterator[str]:
    """Serve on a free port, with TLS or in plain text; yields the address."""
    server = grpc.server(ThreadPoolExecutor(max_workers=16))
    add_InferenceServicer_to_server(fake, server)
    port = (
        server.add_insecure_port("127.0.0.1:0")
        if credentials is None
        else server.add_secure_port("127.0.0.1:0", credentials)
    )
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=1.0).wait()
