"""Synthetic load: when requests are due, and what they ask.

Open loop: a request is sent when it is due, however slow the answers before it are. Closed loop:
a fixed number of requests is under way at any time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice

from cluster.bench.aims import AimMix
from cluster.bench.sender import OnRecord, PlannedRequest, Sender
from cluster.bench.statistics import RequestRecord
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
    on_record: OnRecord = lambda record: None  # told of each as it ends
    metadata: Metadata = ()  # sent with each request
    aims: AimMix = field(default_factory=AimMix)  # of the requests

    async def run(self) -> list[RequestRecord]:
        """Send every request, wait for all of them, and return their records."""
        sender = Sender(self.stub, self.on_record, self.metadata)
        sender.start()
        if self.plan.concurrency is None:
            await self._open_loop(sender)
        else:
            await self._closed_loop(sender)
        return sender.records

    async def _open_loop(self, sender: Sender) -> None:
        assert self.plan.rate_per_s is not None
        arrivals = poisson_arrivals(self.plan.rate_per_s, self.shape.seed)
        async with asyncio.TaskGroup() as group:
            for index, due_s in zip(self.plan.indices(), arrivals, strict=False):
                if self.plan.is_over(due_s):
                    return
                await asyncio.sleep(max(0.0, due_s - sender.now_s()))
                group.create_task(sender.send(self._planned(index), due_s))

    async def _closed_loop(self, sender: Sender) -> None:
        indices = self.plan.indices()

        async def worker() -> None:
            for index in indices:  # shared: each index is taken once
                due_s = sender.now_s()
                if self.plan.is_over(due_s):
                    return
                await sender.send(self._planned(index), due_s)

        async with asyncio.TaskGroup() as group:
            for _ in range(self.plan.concurrency or 0):
                group.create_task(worker())

    def _planned(self, index: int) -> PlannedRequest:
        index += self.first_index
        message = self.shape.request(index, self.model).request
        aim = self.aims.draw(index)
        aim.write(message)
        return PlannedRequest(message, str(index), aim, self.plan.timeout_s)
