"""Sends requests of a load to a server and keeps a record of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from cluster.bench.aims import NO_AIM, Aim
from cluster.bench.statistics import TRUNCATED, RequestRecord
from cluster.rpc.connection import Metadata
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

_DETAILS_KEY = "grpc-status-details-bin"

OnRecord = Callable[[RequestRecord], None]
"""Called as each request ends."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request before it is sent."""

    message: pb.GenerateRequest
    request_id: str  # in the run's workload; the gateway chooses its own
    aim: Aim = NO_AIM
    timeout_s: float = 600.0  # deadline


class Sender:
    """Sends to one server; its clock begins with `start`.

    Args:
        stub: Of a server of the public API.
        on_record: Told of each request that ended.
        metadata: Sent with each request.
    """

    def __init__(
        self,
        stub: InferenceStub,
        on_record: OnRecord = lambda record: None,
        metadata: Metadata = (),
    ) -> None:
        self._stub = stub
        self._on_record = on_record
        self._metadata = metadata
        self._start_s = 0.0
        self.records: list[RequestRecord] = []  # in the order of their ends

    def start(self) -> None:
        """Begin the run: it is 0 s now."""
        self._start_s = time.perf_counter()

    def now_s(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._start_s

    async def send(self, planned: PlannedRequest, due_s: float) -> list[int]:
        """Send a request and return the tokens of its answer as far as they came.

        A failure of the server is a record, not an exception.

        Args:
            planned: What to send.
            due_s: When it was due: waiting in this process counts as latency.
        """
        answer: list[int] = []
        record = replace(
            await self._stream(planned, due_s, answer),
            request_id=planned.request_id,
            service_class=planned.aim.served_as,
            objective=planned.aim.objective,
        )
        self.records.append(record)
        self._on_record(record)
        return answer

    async def _stream(
        self, planned: PlannedRequest, due_s: float, answer: list[int]
    ) -> RequestRecord:
        times_s: list[float] = []
        usage: pb.Usage | None = None
        request = pb.GenerateStreamRequest(request=planned.message)
        try:
            async for event in self._stub.GenerateStream(
                request, timeout=planned.timeout_s, metadata=self._metadata
            ):
                kind = event.WhichOneof("event")
                if kind == "delta" and event.delta.token_ids:
                    times_s.append(self.now_s())
                    answer += event.delta.token_ids
                elif kind == "finished":
                    usage = event.finished.usage
        except grpc.aio.AioRpcError as error:
            reason, retry_after_s = _refusal(error)
            failed = RequestRecord(due_s, self.now_s(), error.code().name, tuple(times_s))
            return replace(
                failed, num_tokens=len(answer), reason=reason, retry_after_s=retry_after_s
            )
        is_whole = usage is not None and usage.completion_tokens == len(answer)
        counted = usage or pb.Usage()
        return RequestRecord(
            due_s,
            self.now_s(),
            "OK" if is_whole else TRUNCATED,
            tuple(times_s),
            len(answer),
            counted.prompt_tokens,
            counted.cached_tokens,
        )


def _refusal(error: Any) -> tuple[str, float | None]:
    """Return the stable reason of an error and when to try again; empty and None if not said."""
    metadata = error.trailing_metadata() or ()
    data = next((value for key, value in metadata if key == _DETAILS_KEY), b"")
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    try:
        unpacked = [(d.Unpack(info), d.Unpack(retry)) for d in Status.FromString(data).details]
    except DecodeError:
        return "", None  # somebody on the way wrote them
    has_retry = any(is_retry for _, is_retry in unpacked)
    delay_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return info.reason, delay_s if has_retry else None
