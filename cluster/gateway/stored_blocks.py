"""The blocks of a prompt in the store: one key per block, worker and layout of the fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.gateway.fleet import Fleet
from cluster.kvstore.block_hash import block_hashes
from cluster.kvstore.block_key import block_keys, part_prefix
from cluster.kvstore.block_store import BlockStore
from cluster.types import ReplicaInfo

_CHUNK_KEYS = 1024  # of one call, so that it keeps its deadline


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """What decides how a model's blocks are cut and named; replicas of one layout share blocks."""

    fingerprint: str  # of weights, dtype and tensor-parallel layout, hex
    tp: int
    pp: int
    block_size: int  # tokens

    @classmethod
    def of(cls, info: ReplicaInfo) -> Layout:
        """Return the layout of a replica."""
        return cls(info.fingerprint, info.tp, info.pp, info.block_size)

    def hashes(self, token_ids: tuple[int, ...], salt: bytes) -> list[bytes]:
        """Return the hashes of a prompt's full blocks."""
        return block_hashes(
            token_ids, self.block_size, fingerprint=bytes.fromhex(self.fingerprint), salt=salt
        )

    def part_prefixes(self) -> list[bytes]:
        """Return what the keys of each worker's parts begin with."""
        fingerprint = bytes.fromhex(self.fingerprint)
        return [
            part_prefix(fingerprint, pp=self.pp, part=part) for part in range(self.tp * self.pp)
        ]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens as one tenant's: what names their blocks."""

    token_ids: tuple[int, ...]
    salt: bytes


class StoredBlocks:
    """Asks for, pins and unpins the blocks of whole prompts.

    While an upgrade is under way there are several layouts; a block counts as stored where every
    worker of every one of them finds its part.

    Args:
        store: Of the blocks; None where none are stored. Stays the caller's.
        fleet: Knows the layouts.
    """

    def __init__(self, store: BlockStore | None, fleet: Fleet) -> None:
        self.store = store
        self._fleet = fleet

    def layouts(self) -> list[Layout]:
        """Return the layouts of all known replicas, in a fixed order."""
        return sorted({Layout.of(link.info) for link in self._fleet.links})

    async def count(self, prompt: Prompt) -> int:
        """Return how many leading blocks are stored; 0 without a store or a replica.

        Raises:
            UnavailableError: The store does not answer.
        """
        counts = []
        if self.store is not None:
            for chunks in await self._parts(prompt):
                counts.append(await _leading(self.store, chunks))
        return min(counts, default=0)

    async def pin(self, prompt: Prompt) -> bool:
        """Renew and pin what is stored; return whether that is every block.

        Raises:
            UnavailableError: The store does not answer.
        """
        is_whole = True
        if self.store is not None:
            for chunks in await self._parts(prompt):
                for keys in chunks:
                    is_whole &= all(await self.store.touch_blocks(keys, pinned=True))
        return is_whole

    async def unpin(self, prompt: Prompt, others: Iterable[Prompt]) -> None:
        """Let a prompt's blocks be evicted, but for those that another prompt has too.

        Raises:
            UnavailableError: The store does not answer.
        """
        if self.store is None:
            return
        rivals = [other.token_ids for other in others if other.salt == prompt.salt]
        num_shared = max((_num_common(prompt.token_ids, rival) for rival in rivals), default=0)
        for chunks in await self._parts(prompt, from_token=num_shared):
            for keys in chunks:
                await self.store.unpin_blocks(keys)

    async def _parts(self, prompt: Prompt, from_token: int = 0) -> list[list[list[bytes]]]:
        """Return the keys of each worker of each layout, in chunks along the prompt.

        They are made on a thread: a prompt may have thousands of blocks, and the loop has streams.

        Args:
            prompt: Whose.
            from_token: Full blocks before it are left out.
        """
        layouts = self.layouts()
        return await asyncio.to_thread(_keys, layouts, prompt, from_token)


def _keys(layouts: list[Layout], prompt: Prompt, from_token: int) -> list[list[list[bytes]]]:
    parts = []
    for layout in layouts:
        hashes = layout.hashes(prompt.token_ids, prompt.salt)[from_token // layout.block_size :]
        for prefix in layout.part_prefixes():
            keys = block_keys(prefix, hashes)
            parts.append([keys[i : i + _CHUNK_KEYS] for i in range(0, len(keys), _CHUNK_KEYS)])
    return parts


def _num_common(tokens: tuple[int, ...], others: tuple[int, ...]) -> int:
    """Return how many leading tokens two prompts share: their hash chains share those blocks."""
    pairs = enumerate(zip(tokens, others, strict=False))
    shorter = min(len(tokens), len(others))
    return next((index for index, (one, other) in pairs if one != other), shorter)


async def _leading(store: BlockStore, chunks: list[list[bytes]]) -> int:
    """Return how many keys are present before the first that is not."""
    num_leading = 0
    for keys in chunks:
        present = await store.has_blocks(keys)
        if not all(present):
            return num_leading + present.index(False)
        num_leading += len(keys)
    return num_leading
