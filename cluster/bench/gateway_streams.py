"""Load for `sluice bench gateway`: streams that never end, and probes of the first token."""

from __future__ import annotations

import asyncio
import time
import uuid
from array import array
from dataclasses import dataclass, field

from cluster.rpc.sluice.internal.v1 import engine_pb2
from cluster.rpc.sluice.internal.v1.engine_pb2_grpc import EngineStub
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

PROBE_SEED = 0  # of no stream
_PROBE_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Traffic:
    """What the client received, of all streams together."""

    num_messages: int = 0  # events that brought tokens
    num_tokens: int = 0
    num_requests: int = 0  # begun
    received_s: dict[int, array[float]] | None = None  # by seed, one per token, if wanted

    def count(self, seed: int, num_tokens: int) -> None:
        """Count one message."""
        self.num_messages += 1
        self.num_tokens += num_tokens
        if self.received_s is not None:
            times = self.received_s.setdefault(seed, array("d"))
            times.extend([time.monotonic()] * num_tokens)


@dataclass(slots=True)
class EndlessStreams:
    """A number of streams; one that reaches the context's limit is followed by the next."""

    stub: InferenceStub
    model: pb.Model
    traffic: Traffic = field(default_factory=Traffic)

    async def run(self, num_streams: int) -> None:
        """Receive until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(num_streams):
                group.create_task(self._one())

    async def _one(self) -> None:
        while True:
            self.traffic.num_requests += 1
            seed = self.traffic.num_requests  # names the stream: the gateway passes it on
            async for event in self.stub.GenerateStream(self._request(seed)):
                if event.HasField("delta"):
                    self.traffic.count(seed, len(event.delta.token_ids))

    def _request(self, seed: int) -> pb.GenerateStreamRequest:
        prompt = pb.TokenIds(ids=[1])
        sampling = pb.SamplingParams(
            max_tokens=self.model.max_model_len - 1, ignore_eos=True, seed=seed
        )
        return pb.GenerateStreamRequest(
            request=pb.GenerateRequest(token_ids=prompt, sampling=sampling)
        )


async def gateway_ttft_s(stub: InferenceStub, text: str) -> float:
    """Return the time from a text prompt to the first token through the gateway, seconds."""
    sampling = pb.SamplingParams(max_tokens=1, ignore_eos=True, seed=PROBE_SEED)
    request = pb.GenerateStreamRequest(request=pb.GenerateRequest(text=text, sampling=sampling))
    start_s = time.perf_counter()
    call = stub.GenerateStream(request, timeout=_PROBE_TIMEOUT_S)
    ttft_s = 0.0
    async for event in call:
        if event.HasField("delta") and not ttft_s:
            ttft_s = time.perf_counter() - start_s
    return ttft_s


class DirectProbe:
    """One session with the leader, as a gateway keeps it, without the gateway."""

    def __init__(self, stub: EngineStub, prompt_token_ids: list[int]) -> None:
        self._call = stub.Session()
        self._prompt_token_ids = prompt_token_ids

    async def ttft_s(self) -> float:
        """Return the time from token ids to the first token, straight from the leader, seconds."""
        submit = engine_pb2.Submit(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=self._prompt_token_ids,
            sampling=engine_pb2.Sampling(max_tokens=1, ignore_eos=True, seed=PROBE_SEED),
        )
        start_s = time.perf_counter()
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            await self._call.write(engine_pb2.SessionRequest(submit=submit))
            await self._call.read()
        return time.perf_counter() - start_s

    def close(self) -> None:
        """End the session."""
        self._call.cancel()
