"""The kinds of stores that one contract is tested on."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.kvstore.store import Store

_numbers = itertools.count()


def fresh_namespace() -> str:
    return f"test-{os.getpid()}-{next(_numbers)}"


async def wait_for_store(store: Store, timeout_s: float) -> None:
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
    elapse: Callable[[float], Awaitable[None]]
    url: str = "embedded"
    opened: list[Store] = field(default_factory=list)

    async def open(self, **knobs: Any) -> Store:
        knobs = {"namespace": fresh_namespace(), "timeout_s": 5.0} | knobs
        store = self.make(StoreConfig(url=self.url, **knobs))
        self.opened.append(store)
        await wait_for_store(store, 30.0)
        return store
