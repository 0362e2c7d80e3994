"""Synthetic load: when requests are due, what they ask, and one stream's record.

Open loop: a request is sent when it is due, however slow the answers before it are. Closed loop:
a fixed number of requests is under way at any time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice

import grpc

from cluster.bench.statistics import TRUNCATED, RequestRecord
from cluster.rpc.connection import Metadata
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What every request of a run looks like. The same seed gives the same requests."""

    num_input_tokens: int = 256  # of the prompt, shared prefix included
    num_output_tokens: int = 64  # of the answer, exactly: end-of-text is ignored
    num_shared_prefix_tokens: int = 0  # first tokens that all prompts have in common
    seed: int = 0

    def prompt(self, index: int, vocab_size: int) -> list[int]:
        """Return the token ids of request `index`, uniform over the vocabulary."""
        prefix = _random_tokens(f"{self.seed}/prefix", self.num_shared_prefix_tokens, vocab_size)
        num_own = self.num_input_tokens - self.num_shared_prefix_tokens
        return prefix + _random_tokens(f"{self.seed}/{index}", num_own, vocab_size)

    def request(self, index: int, model: pb.Model) -> pb.GenerateStreamRequest:
        """Return request `index` for `model`: greedy, of exactly `num_output_tokens`."""
        sampling = pb.SamplingParams(
            max_tokens=self.num_output_tokens, temperature=0.0, ignore_eos=True
        )
        prompt = pb.TokenIds(ids=self.prompt(index, model.vocab_size))
        return pb.GenerateStreamRequest(
            request=pb.GenerateRequest(model=model.name, token_ids=prompt, sampling=sampling)
        )


def _random_tokens(seed: str, num_tokens: int, vocab_size: int) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=num_tokens)


def poisson_arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """Yield the due times of a Poisson process, seconds from its start; the first one is 0."""
    gaps = random.Random(f"{seed}/arrivals")
    due_s = 0.0
    while True:
        yield due_s
        due_s += gaps.expovariate(rate_per_s)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How many requests, and when."""

    num_requests: int | None  # at the most; None is bounded by duration_s alone
    duration_s: float | None  # none is sent later than this; None is bounded by num_requests
    rate_per_s: float | None = None  # open loop, requests per second
    concurrency: int | None = None  # closed loop, requests under way
    timeout_s: float = 600.0  # deadline of one request

    def __post_init__(self) -> None:
        assert (self.rate_per_s is None) != (self.concurrency is None), "one of the two loops"
        assert self.num_requests is not None or self.duration_s is not None, "unbounded"

    def indices(self) -> Iterator[int]:
        """Yield the indices of the requests that may be sent."""
        return islice(count(), self.num_requests)

    def is_over(self, elapsed_s: float) -> bool:
        """Return whether no request may be sent any more after `elapsed_s` seconds."""
        return self.duration_s is not None and elapsed_s > self.duration_s


@dataclass(slots=True)
class LoadRun:
    """One run of a plan against one server."""

    stub: InferenceStub
    model: pb.Model
    shape: RequestShape
    plan: LoadPlan
    first_index: int = 0  # of the requests: warm-up and run draw different prompts
    on_record: Callable[[RequestRecord], None] = lambda record: None  # called as each ends
    metadata: Metadata = ()  # sent with each request
    _start_s: float = 0.0
    _records: list[RequestRecord] = field(default_factory=list)

    async def run(self) -> list[RequestRecord]:
        """Send every request, wait for all of them, and return their records."""
        self._start_s = time.perf_counter()
        await (self._open_loop() if self.plan.concurrency is None else self._closed_loop())
        return self._records

    async def _open_loop(self) -> None:
        assert self.plan.rate_per_s is not None
        arrivals = poisson_arrivals(self.plan.rate_per_s, self.shape.seed)
        async with asyncio.TaskGroup() as group:
            for index, due_s in zip(self.plan.indices(), arrivals, strict=False):
                if self.plan.is_over(due_s):
                    return
                await asyncio.sleep(max(0.0, due_s - self._now_s()))
                group.create_task(self._send(index, due_s))

    async def _closed_loop(self) -> None:
        indices = self.plan.indices()

        async def worker() -> None:
            for index in indices:  # shared: each index is taken once
                if self.plan.is_over(self._now_s()):
                    return
                await self._send(index, self._now_s())

        async with asyncio.TaskGroup() as group:
            for _ in range(self.plan.concurrency or 0):
                group.create_task(worker())

    async def _send(self, index: int, due_s: float) -> None:
        request = self.shape.request(self.first_index + index, self.model)
        record = await stream_record(
            self.stub, request, due_s, self._now_s, self.plan.timeout_s, self.metadata
        )
        self._records.append(record)
        self.on_record(record)

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s


async def stream_record(
    stub: InferenceStub,
    request: pb.GenerateStreamRequest,
    due_s: float,
    now_s: Callable[[], float],
    timeout_s: float,
    metadata: Metadata = (),
) -> RequestRecord:
    """Send one request and return its record; a failure of the server is one, not an exception.

    Args:
        stub: Of a server of the public API.
        request: What to send.
        due_s: When it was due, in the time of `now_s`.
        now_s: The clock of the run, seconds.
        timeout_s: Deadline of the request.
        metadata: Sent with it.
    """
    times_s: list[float] = []
    num_tokens = 0
    usage: pb.Usage | None = None
    status = "OK"
    try:
        async for event in stub.GenerateStream(request, timeout=timeout_s, metadata=metadata):
            kind = event.WhichOneof("event")
            if kind == "delta" and event.delta.token_ids:
                times_s.append(now_s())
                num_tokens += len(event.delta.token_ids)
            elif kind == "finished":
                usage = event.finished.usage
    except grpc.aio.AioRpcError as error:
        status = error.code().name
    else:
        if usage is None or usage.completion_tokens != num_tokens:
            status = TRUNCATED
    counted = usage or pb.Usage()
    return RequestRecord(
        due_s,
        now_s(),
        status,
        tuple(times_s),
        num_tokens,
        counted.prompt_tokens,
        counted.cached_tokens,
    )
