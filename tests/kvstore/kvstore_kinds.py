"""The kinds of stores that one contract is tested on."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.kvstore.block_store import BlockStore, FetchedBlocks
from cluster.kvstore.store import Store

_numbers = itertools.count()


def fresh_namespace() -> str:
    return f"test-{os.getpid()}-{next(_numbers)}"


def fresh_keys(num_keys: int, prefix: bytes = b"model...01", seed: int = 5) -> list[bytes]:
    """Return keys as block_key.py makes them, 26 bytes; spread over the shards of a cluster."""
    chance = random.Random(seed)
    return [prefix + chance.randbytes(16) for _ in range(num_keys)]


def keys_of_one_shard(num_keys: int, seed: int = 5) -> list[bytes]:
    """Return keys that have to make room for each other, in a cluster too."""
    return [key[:10] + bytes(4) + key[14:] for key in fresh_keys(num_keys, seed=seed)]


def plain(fetched: FetchedBlocks) -> list[bytes | None]:
    return [None if value is None else bytes(value) for value in fetched.values]


async def wait_for_store(store: Store | BlockStore, timeout_s: float) -> None:
    """Return when the store answers."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return await store.ping()
        except UnavailableError:
            if time.monotonic() > deadline_s:
                raise
        await asyncio.sleep(0.02)


@dataclass
class Kind:
    """How to open stores of one kind, and how time passes for them."""

    name: str
    make: Callable[[StoreConfig], Store]
    make_blocks: Callable[[StoreConfig], BlockStore]
    elapse: Callable[[float], Awaitable[None]]
    url: str = "embedded"
    num_shards: int = 1  # that share the budget
    opened: list[Store | BlockStore] = field(default_factory=list)

    async def open(self, **knobs: Any) -> Store:
        return await self._ready(self.make(self._config(knobs)))

    async def open_blocks(self, **knobs: Any) -> BlockStore:
        return await self._ready(self.make_blocks(self._config(knobs)))

    def _config(self, knobs: dict[str, Any]) -> StoreConfig:
        knobs = {"namespace": fresh_namespace(), "timeout_s": 5.0} | knobs
        return StoreConfig(url=self.url, **knobs)

    async def _ready(self, store: Any) -> Any:
        self.opened.append(store)
        await wait_for_store(store, 30.0)
        return store
