"""A small cluster whose tiers matter, the streams that load it, and what they have to answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from cluster.client import AsyncClient, Finished, TextDelta, Usage
from cluster.clock import WallClock
from cluster.config import ClusterConfig, load_config
from cluster.model.checkpoint import inspect_checkpoint
from cluster.replica.build import load_whole, make_engine
from cluster.replica.executor import InProcessExecutor
from cluster.types import EngineRequest, SamplingParams

NUM_STREAMS = 32
BLOCK_SIZE = 16
VOCAB_SIZE = 4096
_PREFIX_TOKENS = (48, 64, 96, 130, 176, 224)
NUM_PREFIXES = len(_PREFIX_TOKENS)
REQUEST_TIMEOUT_S = 20.0  # many times what one takes, and less than the slowest fault

_TINY = (
    "model.dtype=float32",  # batches of every size give the same tokens
    "parallel.num_cpus_per_worker=0.1",
    "replica.num_replicas=2",
    "gateway.port=0",
    "cache.num_blocks=120",  # of 49,152 bytes; the streams of one replica need about 150
    "cache.host_memory_bytes=4194304",
    "store.kv_write_after_uses=1",
    "store.timeout_s=0.5",
)


@dataclass(frozen=True)
class Ask:
    """One request of the mix."""

    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class Answer:
    """What one stream has brought."""

    token_ids: tuple[int, ...]
    usage: Usage


def cluster_config(url: str, namespace: str, *more: str) -> ClusterConfig:
    """Return the configuration of two groups of one worker with small tiers.

    Args:
        url: Of the store.
        namespace: In it.
        more: Overrides.
    """
    return load_config(None, [*_TINY, f"store.url={url}", f"store.namespace={namespace}", *more])


def random_tokens(seed: str, num_tokens: int) -> tuple[int, ...]:
    """Return a prompt, or a part of one, that nobody else has."""
    randomness = random.Random(seed)
    return tuple(randomness.randrange(VOCAB_SIZE) for _ in range(num_tokens))


def prompt_mix() -> list[Ask]:
    """Return 32 requests, 60 to 300 tokens, greedy and seeded; the first six differ in prefix."""
    prefixes = [random_tokens(f"prefix {i}", n) for i, n in enumerate(_PREFIX_TOKENS)]
    asks = []
    for index in range(NUM_STREAMS):
        tail = random_tokens(f"tail {index}", 12 + index * 2)
        greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        seeded = SamplingParams(
            max_tokens=12, temperature=0.8, top_p=0.95, seed=index, ignore_eos=True
        )
        asks.append(Ask(prefixes[index % len(prefixes)] + tail, seeded if index % 2 else greedy))
    return asks


@cache
def expected_answers() -> list[tuple[int, ...]]:
    """Return what the mix is answered by an engine of its own, without any tier or store."""
    config = cluster_config("embedded", "none", "cache.host_memory_bytes=0", "store.kv_url=off")
    model = inspect_checkpoint(config.model.folder)
    runner = load_whole(config, num_blocks=800, max_model_len=512, num_threads=1)
    executor = InProcessExecutor(runner)
    engine = make_engine(config, model, executor, WallClock())
    answers: list[list[int]] = [[] for _ in prompt_mix()]
    for index, ask in enumerate(prompt_mix()):
        engine.add(EngineRequest(str(index), ask.prompt, ask.sampling))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            answers[int(output.request_id)] += [token.token_id for token in output.tokens]
    executor.shutdown()
    return [tuple(answer) for answer in answers]


async def answers(
    address: str,
    asks: Sequence[Ask],
    api_key: str,
    *,
    num_rounds: int = 1,
    when_running: Callable[[], None] | None = None,
) -> list[list[Answer]]:
    """Stream all asks at once, each again as soon as it ends; return each one's answers.

    Args:
        address: Of the gateway.
        asks: The streams.
        api_key: Of who asks.
        num_rounds: How often each is asked.
        when_running: Called in a thread once, when some streams have begun to answer.
    """
    num_begun = 0
    is_under_way = asyncio.Event()

    async def one(client: AsyncClient, ask: Ask) -> Answer:
        nonlocal num_begun
        tokens: list[int] = []
        events = client.stream(
            token_ids=ask.prompt, sampling=ask.sampling, timeout_s=REQUEST_TIMEOUT_S
        )
        async for event in events:
            if isinstance(event, TextDelta):
                num_begun += not tokens
                tokens += event.token_ids
            if isinstance(event, Finished):
                usage = event.usage
            if num_begun * 8 >= len(asks):
                is_under_way.set()
        return Answer(tuple(tokens), usage)

    async def disturb() -> None:
        await is_under_way.wait()
        if when_running is not None:
            await asyncio.to_thread(when_running)

    async def stream(client: AsyncClient, ask: Ask) -> list[Answer]:
        return [await one(client, ask) for _ in range(num_rounds)]

    async with AsyncClient(address, api_key=api_key) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(disturb())
        streams = [tasks.create_task(stream(client, ask)) for ask in asks]
    return [task.result() for task in streams]


def check_answers(done: Sequence[Sequence[Answer]]) -> None:
    """Assert that every answer to the mix is what it is without a store."""
    for index, (rounds, expected) in enumerate(zip(done, expected_answers(), strict=True)):
        for answer in rounds:
            assert answer.token_ids == expected, f"stream {index} answers something else"
