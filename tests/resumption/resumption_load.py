"""Streams that run while something is done to their cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cluster.bench.resumption_cases import PROMPT
from cluster.bench.resumption_stream import Answer, Cut, Followed, difference, follow
from cluster.client import AsyncClient
from cluster.types import SamplingParams


def sampling_of_stream(index: int, num_tokens: int) -> SamplingParams:
    """Return the parameters of one of many streams: no two have one seed, every third is greedy."""
    temperature = 0.8 if index % 3 else 0.0
    return SamplingParams(
        max_tokens=num_tokens, temperature=temperature, top_p=0.9, seed=index, ignore_eos=True
    )


class Load:
    """Streams at once, whose unbroken answers are known.

    Args:
        client: Of the cluster's gateways.
        num_streams: At once.
        num_tokens: Of each answer.
        resume_timeout_s: Of the client; 0: it resumes nothing.
    """

    def __init__(
        self,
        client: AsyncClient,
        num_streams: int,
        num_tokens: int,
        *,
        resume_timeout_s: float = 0.0,
    ) -> None:
        self._client = client
        self._num_streams = num_streams
        self._num_tokens = num_tokens
        self._resume_timeout_s = resume_timeout_s
        self._references: list[Answer] = []

    async def learn(self) -> None:
        """Have all of them answered, undisturbed."""
        for followed in await self.run(None):
            assert followed.answer is not None, followed.error
            self._references.append(followed.answer)

    async def run(self, disturb: Callable[[], Awaitable[None]] | None) -> list[Followed]:
        """Return the streams as they ended.

        Args:
            disturb: Awaited once when every stream has got a token; None leaves them alone.
        """
        num_waiting = self._num_streams
        is_under_way = asyncio.Event()

        def begun(replica_id: str) -> None:
            nonlocal num_waiting
            num_waiting -= 1
            if num_waiting == 0:
                is_under_way.set()

        async def one(index: int) -> Followed:
            return await follow(
                self._client,
                f"{PROMPT}        # {index}\n",
                sampling_of_stream(index, self._num_tokens),
                cut=Cut(1, begun),
                resume_timeout_s=self._resume_timeout_s,
            )

        async with asyncio.TaskGroup() as tasks:
            streams = [tasks.create_task(one(index)) for index in range(self._num_streams)]
            if disturb is not None:
                async with asyncio.timeout(30):
                    await is_under_way.wait()
                await disturb()
        return [stream.result() for stream in streams]

    def check(self, streams: list[Followed]) -> None:
        """Assert that every stream is what it is undisturbed."""
        for index, (followed, expected) in enumerate(zip(streams, self._references, strict=True)):
            assert followed.answer is not None, f"stream {index}: {followed.error}"
            found = difference(followed.answer, expected)
            assert not found, f"stream {index}, replicas {followed.replica_ids}: {found}"
