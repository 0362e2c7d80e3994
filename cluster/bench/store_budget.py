"""Does a budget hold while ten times its bytes are written, and does what is used stay?

put put put put put  get hot  put put put put put  get hot ...      new blocks, and the hot set
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from redis.asyncio import Redis

from cluster.config import StoreConfig
from cluster.errors import SluiceError
from cluster.kvstore.block_key import block_keys, part_prefix
from cluster.kvstore.redis_blocks import RedisBlocks

BUDGET_BYTES = 64 * 2**20
TIMES = 10  # the budget is written
HOT_SHARE = 0.1  # of the budget
ROUNDS_PER_BUDGET = 8  # of reading the hot set, while as much as the budget is written
TIMEOUT_S = 10.0  # the books are looked at, not the speed
SIZES = (16 * 2**10, 192 * 2**10)

_PREFIX = part_prefix(b"budget", pp=1, part=0)


def run_budget(config: StoreConfig, on_progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Return used bytes against the budget, rejected writes and hits, by block size.

    Args:
        config: Of the store: a Redis that nobody else writes to at the time.
        on_progress: Told what is being done.

    Raises:
        SluiceError: The server does not answer.
    """
    config = config.model_copy(update={"max_bytes": BUDGET_BYTES, "timeout_s": TIMEOUT_S})
    rows = []
    for index, size in enumerate(SIZES):

        def told(done: int, total: int, index: int = index, size: int = size) -> None:
            on_progress(f"budget: {size // 1024} KiB", index * total + done, len(SIZES) * total)

        rows.append(asyncio.run(_BudgetRun(config, size).run(told)))
    return {"budget_bytes": BUDGET_BYTES, "times": TIMES, "sizes": rows}


class _BudgetRun:
    def __init__(self, config: StoreConfig, size: int) -> None:
        self._size = size
        self._num_at_once = max(1, config.kv_chunk_bytes // size)
        self._blocks = RedisBlocks(config)
        self._redis = Redis.from_url(config.resolved_kv_url)
        self._num_hot = max(1, int(HOT_SHARE * BUDGET_BYTES / size))
        self._num_read = self._num_hit = self._num_rejected = self._num_written = 0
        self._used: list[int] = []  # by the books
        self._memory: list[int] = []  # by the server

    async def run(self, told: Callable[[int, int], None]) -> dict[str, Any]:
        try:
            await self._blocks.flush()
            before = await self._memory_bytes()
            await self._put("hot", 0, self._num_hot)
            await self._read_hot()  # it is hot because it was used more than once
            self._num_read = self._num_hit = 0
            await self._write_and_read(told)
            stats = await self._blocks.stats()
        finally:
            await self._blocks.flush()
            await self._blocks.close()
            await self._redis.aclose()
        return {
            "block_bytes": self._size,
            "written_bytes": self._num_written * self._size,
            "used_share": max(self._used) / BUDGET_BYTES,
            "memory_share": (max(self._memory) - before) / BUDGET_BYTES,
            "num_blocks": stats.num_blocks,
            "num_evicted": stats.num_evicted,
            "num_rejected": self._num_rejected,
            "hot_reads": self._num_read,
            "hot_hit_rate": self._num_hit / self._num_read,
        }

    async def _write_and_read(self, told: Callable[[int, int], None]) -> None:
        num_blocks = TIMES * BUDGET_BYTES // self._size
        between = max(1, BUDGET_BYTES // self._size // ROUNDS_PER_BUDGET)
        for start in range(0, num_blocks, between):
            told(start, num_blocks)
            await self._put("cold", start, min(between, num_blocks - start))
            await self._read_hot()
            stats = await self._blocks.stats()
            self._used.append(stats.used_bytes)
            self._memory.append(await self._memory_bytes())

    async def _put(self, kind: str, first: int, num_blocks: int) -> None:
        """Write new blocks, each the first of its chain: none is worth less for its place."""
        for start in range(first, first + num_blocks, self._num_at_once):
            keys = _keys(kind, start, min(self._num_at_once, first + num_blocks - start))
            stored = await self._blocks.put_blocks({key: os.urandom(self._size) for key in keys})
            self._num_rejected += stored.count(False)
            self._num_written += len(keys)

    async def _read_hot(self) -> None:
        for start in range(0, self._num_hot, self._num_at_once):
            keys = _keys("hot", start, min(self._num_at_once, self._num_hot - start))
            values = (await self._blocks.get_blocks(keys)).values
            self._num_read += len(keys)
            self._num_hit += sum(value is not None for value in values)

    async def _memory_bytes(self) -> int:
        """Return what the server holds, without the buffers of its connections."""
        info = await self._redis.info("memory")
        used, clients = info.get("used_memory"), info.get("mem_clients_normal", 0)
        if used is None:
            raise SluiceError("the server does not tell its memory: INFO memory has no used_memory")
        return int(used) - int(clients)


def _keys(kind: str, first: int, num_blocks: int) -> list[bytes]:
    numbers = range(first, first + num_blocks)
    hashes = [blake2b(f"{kind}/{n}".encode(), digest_size=16).digest() for n in numbers]
    return block_keys(_PREFIX, hashes)
