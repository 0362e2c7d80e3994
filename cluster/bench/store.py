"""`sluice bench store`: what the tiers below the KV cache bring, and what they cost.

    raw      bytes to and from Redis, against redis-py           store_raw.py
    budget   ten times the budget is written                     store_budget.py
    ttft     a long prompt, by the tier that has it              store_ttft.py
    decode   the steps of running streams while blocks move      store_decode.py
    prefix   many short requests over one prefix                 store_prefix.py

The first two need no model. With faults there is another load: store_faults.py.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.bench.store_budget import run_budget
from cluster.bench.store_decode import DecodeBench, DecodeLoad
from cluster.bench.store_fault_kinds import FaultySetup
from cluster.bench.store_faults import FaultBench, FaultLoad
from cluster.bench.store_prefix import PrefixBench, PrefixLoad
from cluster.bench.store_raw import run_raw
from cluster.bench.store_redis import redis_url
from cluster.bench.store_ttft import (
    ANSWER_TOKENS,
    CACHE_PROMPTS,
    HOST_PROMPTS,
    TtftBench,
    blocks_of_prompt,
)
from cluster.config import ClusterConfig
from cluster.errors import InvalidArgumentError

PARTS = ("raw", "budget", "ttft", "decode", "prefix")
MODEL_PARTS = frozenset({"ttft", "decode", "prefix"})

OnProgress = Callable[[str, int, int], None]
"""Gets what is being done, and how much of how much is."""


@dataclass(frozen=True)
class StoreBench:
    """One measurement."""

    parts: tuple[str, ...] = PARTS
    num_rounds: int = 3  # of each part but the budget
    prompt_tokens: int = 2000  # of ttft
    decode: DecodeLoad = field(default_factory=DecodeLoad)
    prefix: PrefixLoad = field(default_factory=PrefixLoad)
    seed: int = 0  # of all prompts

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise InvalidArgumentError(
                f"--parts={','.join(self.parts)}: choose from {','.join(PARTS)}", field="parts"
            )

    @property
    def num_sequence_tokens(self) -> int:
        """Tokens of the longest request of the parts."""
        longest = {
            "ttft": self.prompt_tokens + ANSWER_TOKENS,
            "decode": max(self.decode.num_stream_tokens, self.decode.prompt_tokens + 1),
            "prefix": self.prefix.num_tokens,
        }
        return max((longest[part] for part in self.parts if part in longest), default=1)

    def num_blocks(self, block_size: int, max_num_seqs: int) -> int:
        """Return the KV blocks that the parts need."""
        needed = {
            "ttft": CACHE_PROMPTS * blocks_of_prompt(self.prompt_tokens, block_size),
            "decode": self.decode.num_blocks(block_size),
            "prefix": (1 + min(max_num_seqs, self.prefix.num_requests))
            * -(-self.prefix.num_tokens // block_size),
        }
        return max((needed[part] for part in self.parts if part in needed), default=1)

    def num_slots(self, block_size: int) -> int:
        """Return the slots that the parts need."""
        needed = {
            "ttft": HOST_PROMPTS * blocks_of_prompt(self.prompt_tokens, block_size),
            "decode": self.decode.num_blocks(block_size),
            "prefix": 4 * -(-self.prefix.prefix_tokens // block_size),
        }
        return max((needed[part] for part in self.parts if part in needed), default=1)


def run_store_bench(
    config: ClusterConfig,
    bench: StoreBench,
    url: str | None,
    on_progress: OnProgress = lambda *_: None,
) -> dict[str, Any]:
    """Return the figures of all parts.

    Args:
        config: Of the cluster; `store.url` is replaced.
        bench: What to measure.
        url: Of a Redis, `env:NAME` too; None starts one.
        on_progress: Told what is being done.

    Raises:
        ConfigError: There is no Redis, or the model or its memory do not fit.
        SluiceError: A request failed, or the server does not answer.
    """
    with redis_url(url) as found:
        config = _with_store(config, found)
        result: dict[str, Any] = {}
        if "raw" in bench.parts:
            result["raw"] = run_raw(config.store, bench.num_rounds, on_progress)
        if "budget" in bench.parts:
            result["budget"] = run_budget(config.store, on_progress)
        if MODEL_PARTS & set(bench.parts):
            try:
                result |= _run_model_parts(config, bench, on_progress)
            finally:
                if url is not None:  # a server of our own ends with all that it holds
                    asyncio.run(_flush(config))
    return {
        "model": config.model.served_name,
        "redis": "own" if url is None else "given",
        "num_rounds": bench.num_rounds,
        "result": result,
    }


def _run_model_parts(
    config: ClusterConfig, bench: StoreBench, on_progress: OnProgress
) -> dict[str, Any]:
    from cluster.bench.engine_setup import check_engine
    from cluster.bench.store_replica import SharedModel

    size = config.cache.block_size
    num_blocks = bench.num_blocks(size, config.engine.max_num_seqs)
    on_progress("loading", 0, 1)
    info = check_engine(_with_blocks(config, num_blocks), bench.num_sequence_tokens)
    model = SharedModel(config, info, num_blocks=num_blocks, num_slots=bench.num_slots(size))
    result: dict[str, Any] = {}
    try:
        if "ttft" in bench.parts:
            ttft = TtftBench(model, bench.prompt_tokens, bench.seed)
            result["ttft"] = ttft.run(bench.num_rounds, on_progress)
        if "decode" in bench.parts:
            decode = DecodeBench(model, bench.decode, bench.seed)
            result["decode"] = decode.run(bench.num_rounds, on_progress)
        if "prefix" in bench.parts:
            prefix = PrefixBench(model, bench.prefix, bench.seed, on_progress)
            result["prefix"] = prefix.run(bench.num_rounds)
    finally:
        model.close()
    return result


def run_store_faults(
    config: ClusterConfig, load: FaultLoad, seed: int, on_progress: OnProgress = lambda *_: None
) -> dict[str, Any]:
    """Return what faults of a Redis of the benchmark's own cost the requests that run.

    Blocks are written at their first use: the catalogue is known to be asked for again.

    Raises:
        ConfigError: There is no redis-server, or the model or its memory do not fit.
        SluiceError: Already the replica without a store failed.
    """
    from cluster.bench.engine_setup import check_engine
    from cluster.bench.store_replica import SharedModel

    setup = FaultySetup()
    try:
        config = _with_store(config, setup.url)
        store = config.store.model_copy(update={"kv_write_after_uses": 1})
        config = config.model_copy(update={"store": store})
        size = config.cache.block_size
        num_blocks = load.num_blocks(size)
        on_progress("loading", 0, 1)
        info = check_engine(_with_blocks(config, num_blocks), load.num_tokens)
        model = SharedModel(config, info, num_blocks=num_blocks, num_slots=load.num_slots(size))
        try:
            bench = FaultBench(model, load, setup.faults(), seed=seed, on_progress=on_progress)
            return {"model": config.model.served_name, "result": bench.run()}
        finally:
            model.close()
    finally:
        setup.close()


def _with_store(config: ClusterConfig, url: str) -> ClusterConfig:
    """Return the configuration with a store of its own keys."""
    own = {"url": url, "kv_url": "", "namespace": f"sluice-bench-{os.getpid()}"}
    return config.model_copy(update={"store": config.store.model_copy(update=own)})


def _with_blocks(config: ClusterConfig, num_blocks: int) -> ClusterConfig:
    cache = config.cache.model_copy(update={"num_blocks": num_blocks})
    return config.model_copy(update={"cache": cache})


async def _flush(config: ClusterConfig) -> None:
    from cluster.kvstore.redis_blocks import RedisBlocks

    blocks = RedisBlocks(config.store)
    await blocks.flush()
    await blocks.close()
