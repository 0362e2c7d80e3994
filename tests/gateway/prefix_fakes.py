"""Stores that fail when told to, replicas that store what is pinned, and prefixes to register."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from gateway_fakes import BLOCK_SIZE, FINGERPRINT, FakeLeader

from cluster.clock import VirtualClock, WallClock
from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.gateway.prefix_record import PrefixRecord
from cluster.gateway.stored_blocks import StoredBlocks
from cluster.kvstore.block_hash import block_hashes
from cluster.kvstore.block_key import block_keys, part_prefix
from cluster.kvstore.block_store import BlockStore
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.embedded_blocks import EmbeddedBlocks
from cluster.types import EngineOutput, EngineRequest, ReplicaInfo

MODEL = "sluice-demo"
TOKENS = tuple(range(100, 100 + 3 * BLOCK_SIZE + 5))  # three full blocks and a part


class Flaky:
    """Passes every call on to a store, counts them, and fails them while `is_down`."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.is_down = False
        self.reason = "the store does not answer"
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            await asyncio.sleep(0)
            if self.is_down:
                raise UnavailableError(self.reason)
            return await method(*args, **options)

        return call


def flaky_store() -> Any:
    return Flaky(EmbeddedStore(StoreConfig(), clock=VirtualClock()))


def flaky_blocks(**config: Any) -> Any:
    return Flaky(EmbeddedBlocks(StoreConfig(**config), clock=WallClock()))


def record(
    name: str = "system",
    tenant: str = "alice",
    token_ids: tuple[int, ...] = TOKENS,
    model: str = MODEL,
) -> PrefixRecord:
    return PrefixRecord.of(tenant, name, model, token_ids, 1.0)


def keys_of(
    token_ids: tuple[int, ...], *, salt: bytes = b"", pp: int = 1, part: int = 0
) -> list[bytes]:
    """Return the store keys of a prompt's full blocks, as a worker would name them."""
    hashes = block_hashes(token_ids, BLOCK_SIZE, fingerprint=FINGERPRINT, salt=salt)
    return block_keys(part_prefix(FINGERPRINT, pp=pp, part=part), hashes)


def replica_info(replica_id: str = "r1", **fields: Any) -> ReplicaInfo:
    layout = {"fingerprint": FINGERPRINT.hex(), "tp": 1, "pp": 1, "block_size": BLOCK_SIZE}
    facts: dict[str, Any] = {"address": "h:1", "model": "m", "max_model_len": 512}
    return ReplicaInfo(replica_id, **(facts | layout | fields))


def stored_blocks(store: Any, *infos: ReplicaInfo) -> StoredBlocks:
    fleet: Any = SimpleNamespace(links=[SimpleNamespace(info=info) for info in infos])
    return StoredBlocks(store, fleet)


class StoringLeader(FakeLeader):
    """Writes the blocks of registered prefixes to a store, pinned, as a real replica does."""

    def __init__(self, store: BlockStore, replica_id: str = "replica-1") -> None:
        super().__init__(replica_id)
        self.store = store

    async def _answer(self, request: EngineRequest, outputs: asyncio.Queue[EngineOutput]) -> None:
        if request.pins_prefix and not self.refusal:
            keys = keys_of(request.prompt_token_ids, salt=request.salt)
            await self.store.put_blocks(dict.fromkeys(keys, b"x" * 100), pinned=True)
        await super()._answer(request, outputs)

    @property
    def pinned(self) -> list[EngineRequest]:
        """Requests that computed a prefix."""
        return [request for request in self.submitted if request.pins_prefix]
