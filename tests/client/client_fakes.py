"""A server of the public API that answers what a test sets."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
from google.rpc.status_pb2 import Status

from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1 import inference_pb2_grpc

USAGE = pb.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
TIMINGS = pb.Timings(queued_s=0.25, ttft_s=0.5, total_s=1.0)
CHOSEN = pb.TokenLogprob(token_id=5, logprob=-0.5, text="he")
FINISHED = pb.Finished(finish_reason=pb.FINISH_REASON_STOP, usage=USAGE, timings=TIMINGS)
EVENTS = [
    pb.GenerateStreamResponse(seq=0, queued=pb.Queued(position=2)),
    pb.GenerateStreamResponse(seq=1, running=pb.Running(replica_id="a")),
    pb.GenerateStreamResponse(
        seq=2,
        delta=pb.TokenDelta(
            text="hello", token_ids=[5, 6], logprobs=[pb.PositionLogprobs(chosen=CHOSEN)]
        ),
    ),
    pb.GenerateStreamResponse(seq=3, finished=FINISHED),
]


class FakeInference(inference_pb2_grpc.InferenceServicer):
    """Answers what a test sets, and keeps what it was asked."""

    def __init__(self) -> None:
        self.events = EVENTS
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.is_hanging = False
        self.refusal: Status | None = None
        self.explanation: pb.ExplainResponse | None = None
        self.ended = threading.Event()

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        self.requests.append(request.request)
        self.metadata = dict(context.invocation_metadata())
        context.add_callback(self.ended.set)
        if self.refusal is not None:
            details = ("grpc-status-details-bin", self.refusal.SerializeToString())
            context.set_trailing_metadata((details,))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, self.refusal.message)
        yield from self.events
        if self.is_hanging:
            self.ended.wait(30)

    def Tokenize(self, request: Any, context: Any) -> Any:
        return pb.TokenizeResponse(token_ids=[len(request.text)])

    def ClusterStatus(self, request: Any, context: Any) -> Any:
        replica = pb.ReplicaStatus(replica_id="a", state=pb.REPLICA_STATE_READY, tp=2, pp=1)
        return pb.ClusterStatusResponse(replicas=[replica], num_inflight=4, gateway_id="g")

    def Explain(self, request: Any, context: Any) -> Any:
        if self.explanation is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{request.request_id} is not remembered")
        return self.explanation


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, FakeInference]]:
    """Serve on a free port; yields the address and the servicer."""
    servicer = FakeInference()
    grpc_server = grpc.server(futures.ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        servicer.ended.set()
        grpc_server.stop(None).wait(5)
