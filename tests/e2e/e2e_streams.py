"""Streams that run while a test disturbs their cluster; each has to be what it is undisturbed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from waiting import wait_until

from cluster.client import AsyncClient, Finished, TextDelta
from cluster.errors import SluiceError
from cluster.types import SamplingParams

REQUEST_TIMEOUT_S = 100.0  # longer than any disturbance of this room
VOCAB_SIZE = 4096
STREAMS_PER_CLIENT = 4  # each client has one connection, and connections spread over the gateways


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class Answer:
    """What one stream has brought."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    num_counted: int  # tokens, as usage says


@dataclass
class Verdict:
    """What has become of all requests."""

    num_exact: int = 0
    wrong: list[tuple[int, Answer]] = field(default_factory=list)  # stream; not the undisturbed one
    errors: list[str] = field(default_factory=list)  # ended with a status
    gaps_s: list[float] = field(default_factory=list)  # longest time without an event, each request

    def check(self, at_least: int) -> None:
        """Assert that every request was answered exactly, and that there were enough of them."""
        assert not self.errors, f"{len(self.errors)} failed, {self.num_exact} exact: {self.errors}"
        assert not self.wrong, f"{len(self.wrong)} differ: {self.wrong[:3]}"
        assert self.num_exact >= at_least


def ask_mix(num_streams: int, max_tokens: int = 64) -> list[Ask]:
    """Return requests of 20 to 120 tokens, half of them greedy, half seeded with a penalty."""
    randomness = random.Random(7)
    asks = []
    for index in range(num_streams):
        prompt = [randomness.randrange(VOCAB_SIZE) for _ in range(randomness.randrange(20, 120))]
        greedy = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        seeded = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.8,
            top_p=0.9,
            repetition_penalty=1.2,
            seed=index,
            ignore_eos=True,
        )
        asks.append(Ask(tuple(prompt), seeded if index % 2 else greedy))
    return asks


async def answer(client: AsyncClient, ask: Ask, gaps_s: list[float]) -> Answer:
    """Stream one request to its end, and note how long its longest silence was."""
    tokens: list[int] = []
    text, reason, num_counted, gap_s = "", "", 0, 0.0
    last_s = time.monotonic()
    events = client.stream(token_ids=ask.prompt, sampling=ask.sampling, timeout_s=REQUEST_TIMEOUT_S)
    async for event in events:
        now_s = time.monotonic()
        gap_s, last_s = max(gap_s, now_s - last_s), now_s
        if isinstance(event, TextDelta):
            tokens += event.token_ids
            text += event.text
        elif isinstance(event, Finished):
            reason, num_counted = str(event.finish_reason), event.usage.completion_tokens
    gaps_s.append(gap_s)
    return Answer(tuple(tokens), text, reason, num_counted)


def undisturbed(address: str, asks: Sequence[Ask]) -> list[Answer]:
    """Return the answers of a cluster that nobody disturbs."""

    async def ask_all() -> list[Answer]:
        async with AsyncClient(address) as client:
            return list(await asyncio.gather(*(answer(client, ask, []) for ask in asks)))

    return asyncio.run(ask_all())


class Streams:
    """A closed loop of streams in a thread of its own, while the context lasts.

    Args:
        address: Of the gateways.
        asks: One stream each; asked again as soon as it has ended.
        pause_s: Between two requests of a stream: two cores can do only so much.
    """

    def __init__(self, address: str, asks: Sequence[Ask], *, pause_s: float = 0.2) -> None:
        self.verdict = Verdict()
        self._address, self._asks, self._pause_s = address, asks, pause_s
        self._expected = undisturbed(address, asks)
        self._num_rounds = [0] * len(asks)  # answers that each stream has got
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join(REQUEST_TIMEOUT_S + 10.0)
        assert not self._thread.is_alive(), "a stream neither ended nor failed"

    def wait_for_round(self, timeout_s: float) -> float:
        """Wait until every stream has had an answer to a request that it sends from now on."""
        before = list(self._num_rounds)  # the next answer of each may be under way already
        return wait_until(
            lambda: all(
                now >= then + 2 for now, then in zip(self._num_rounds, before, strict=True)
            ),
            timeout_s,
            "every stream goes on",
        )

    async def _run(self) -> None:
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            for index in range(len(self._asks)):
                if index % STREAMS_PER_CLIENT == 0:
                    client = await stack.enter_async_context(AsyncClient(self._address))
                tasks.create_task(self._repeat(client, index))

    async def _repeat(self, client: AsyncClient, index: int) -> None:
        expected = self._expected[index]
        while not self._is_over.is_set():
            began_s = time.monotonic()
            try:
                got = await answer(client, self._asks[index], self.verdict.gaps_s)
            except SluiceError as error:
                lasted_s = time.monotonic() - began_s
                self.verdict.errors.append(f"after {lasted_s:.1f} s {error.code}: {error}")
            else:
                if got == expected:
                    self.verdict.num_exact += 1
                else:
                    self.verdict.wrong.append((index, got))
            self._num_rounds[index] += 1
            await asyncio.sleep(self._pause_s)
