"""Small closed experiments on a real cluster: what an engine's turn takes, seen from outside.

alone     one stream, then single prompts; the other replicas have nothing
together  streams on all replicas that only decode, then one prompt on each replica
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cluster.bench.statistics import percentile
from cluster.bench.validation_calibration import DecodeRun, Measured, PromptRun
from cluster.client import AsyncClient, Running, TextDelta
from cluster.rpc.sluice.v1 import inference_pb2 as pb

_TIMEOUT_S = 60.0
_SHORT_TOKENS = 32
_PROMPT_TOKENS = (64, 256, 480)  # each is one step
_DECODE_TOKENS = 48
_DECODES = ((1, _SHORT_TOKENS), (3, _SHORT_TOKENS), (10, _SHORT_TOKENS), (4, 400))
"""Streams of each replica, and tokens of their prompts."""
_NUM_REPEATS = 2
_NUM_PROMPTS = 5  # of each length
_P90_DEVIATIONS = 1.2816  # of a normal distribution
_MAX_TRIES = 10  # until as many prompts have been on different replicas


@dataclass(slots=True)
class Stream:
    """One answer as its client saw it."""

    sent_s: float
    replica_id: str = ""
    times_s: list[float] = field(default_factory=list)  # of messages with tokens


class Experiments:
    """Runs the experiments, again and again.

    Args:
        client: Of a gateway.
        model: That it serves.
        num_replicas: That serve it.
    """

    def __init__(self, client: AsyncClient, model: pb.Model, num_replicas: int) -> None:
        self._client = client
        self._model = model
        self._num_replicas = num_replicas
        self._rng = random.Random("experiments")

    async def run(self, requests_per_s: float) -> Measured:
        """Return what one turn of all experiments brought, with a capacity found before."""
        single = await self._decode(1, _SHORT_TOKENS)
        gap_s = sum(run.gap_s for run in single) / len(single)
        alone = DecodeRun(1, single[0].context_tokens, gap_s)
        alone_prompts = [await self._prompts(num_tokens, 1) for num_tokens in _PROMPT_TOKENS]
        decodes = [
            run
            for num_streams, num_prompt in _DECODES
            for run in await self._decode(num_streams * self._num_replicas, num_prompt)
        ]
        prompts = [await self._prompts(n, self._num_replicas) for n in _PROMPT_TOKENS]
        return Measured(alone, _found(alone_prompts), decodes, _found(prompts), requests_per_s)

    async def _decode(self, num_streams: int, num_prompt: int) -> list[DecodeRun]:
        runs: list[DecodeRun] = []
        for _ in range(_NUM_REPEATS):
            streams = await self._streams(num_streams, num_prompt, _DECODE_TOKENS)
            runs += decode_runs(streams, num_prompt)
        return runs

    async def _prompts(self, num_tokens: int, num_at_once: int) -> PromptRun | None:
        """Return None where the router never sent them to different replicas."""
        ttfts_s: list[float] = []
        for _ in range(_MAX_TRIES):
            streams = await self._streams(num_at_once, num_tokens, 1)
            if len({stream.replica_id for stream in streams}) == num_at_once:
                ttfts_s += [stream.times_s[0] - stream.sent_s for stream in streams]
            if len(ttfts_s) >= _NUM_PROMPTS * num_at_once:
                break
        ttft_s = percentile(ttfts_s, 50)
        return None if ttft_s is None else PromptRun(num_tokens, ttft_s)

    async def _streams(self, num_streams: int, num_prompt: int, num_output: int) -> list[Stream]:
        return await asyncio.gather(
            *(self._stream(num_prompt, num_output) for _ in range(num_streams))
        )

    async def _stream(self, num_prompt: int, num_output: int) -> Stream:
        prompt = self._rng.choices(range(self._model.vocab_size), k=num_prompt)
        sampling = {"max_tokens": num_output, "temperature": 0.0, "ignore_eos": True}
        stream = Stream(time.perf_counter())
        async for event in self._client.stream(
            token_ids=prompt, sampling=sampling, timeout_s=_TIMEOUT_S
        ):
            if isinstance(event, Running):
                stream.replica_id = event.replica_id
            elif isinstance(event, TextDelta) and event.token_ids:
                stream.times_s.append(time.perf_counter())
        return stream


def decode_runs(streams: Sequence[Stream], num_prompt: int) -> list[DecodeRun]:
    """Return one run for each replica, of the time in which all streams had a token and no end."""
    from_s = max(stream.times_s[0] for stream in streams)
    to_s = min(stream.times_s[-1] for stream in streams)
    context = num_prompt + _DECODE_TOKENS / 2
    runs = []
    for replica_id in sorted({stream.replica_id for stream in streams}):
        own = [stream for stream in streams if stream.replica_id == replica_id]
        gaps_s = [
            later - earlier
            for stream in own
            for earlier, later in pairwise(stream.times_s)
            if earlier >= from_s and later <= to_s
        ]
        if gaps_s:
            mean_s = sum(gaps_s) / len(gaps_s)
            runs.append(DecodeRun(len(own), context, mean_s, _spread(gaps_s)))
    return runs


def _found(runs: Sequence[PromptRun | None]) -> list[PromptRun]:
    return [run for run in runs if run is not None]


def _spread(gaps_s: Sequence[float]) -> float:
    """Return the deviation of the logarithm as the ninetieth percentile tells it."""
    p50, p90 = percentile(gaps_s, 50), percentile(gaps_s, 90)
    assert p50 is not None and p90 is not None, "there are gaps"
    return math.log(max(1.0, p90 / p50)) / _P90_DEVIATIONS
