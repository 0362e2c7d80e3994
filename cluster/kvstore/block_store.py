"""Where KV blocks of all replicas are: a byte budget, and whatever is there can be lost.

A key is what `block_key.py` makes: model, worker's part, block. A value is any bytes; who writes to
a store can be anybody, so values are framed (codec.py), and what does not verify is a miss.

Eviction is by frequency with ageing (eviction.py). Every call has a deadline
(`StoreConfig.timeout_s`) and raises `UnavailableError` when it passes, when the store is out of
reach, or when it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview


def nbytes(buffer: Buffer) -> int:
    """Return how many bytes a buffer has, whatever its items are."""
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


@dataclass(frozen=True, slots=True)
class BlockStoreStats:
    """The books of a block store."""

    used_bytes: int  # counted in the budget
    max_bytes: int
    num_blocks: int
    num_pinned: int  # blocks that eviction spares
    num_evicted: int  # since the store was empty


@dataclass(frozen=True, slots=True)
class FetchedBlocks:
    """What `get_blocks` brought."""

    values: list[Buffer | None]  # one per key; None where it is missing or does not verify
    num_corrupt: int = 0  # values that were there and did not verify


class BlockStore(Protocol):
    """The contract of `embedded_blocks.py` and `redis_blocks.py`; one suite holds them to it."""

    async def put_blocks(
        self, blocks: Mapping[bytes, Buffer], *, pinned: bool = False, position: int = 0
    ) -> list[bool]:
        """Write a chain's blocks, first one first; return which are stored now.

        The budget holds at all times: the least valuable blocks make room. A block that has no
        place even then is not stored. Pinned blocks are spared, as long as they are at most half of
        the budget; further ones are stored like others. A pin is a lease: it ends with the TTL
        (`StoreConfig.kv_ttl_s`) unless it is asked for again, and what was used meanwhile goes on
        as a block like others. Room for a block is never made by another one of the same call, so
        of a chain that is too long the first blocks stay.

        Args:
            blocks: By key.
            pinned: Spare them for a TTL. Those that are pinned stay so without it, until their end.
            position: Place of the first one in its chain, where it is written in several calls.
        """
        ...

    async def get_blocks(self, keys: Sequence[bytes]) -> FetchedBlocks:
        """Return the bytes of each block, bit-exact, and count this as a use of those found."""
        ...

    async def has_blocks(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks are present; no use is counted."""
        ...

    async def touch_blocks(self, keys: Sequence[bytes], *, pinned: bool = False) -> list[bool]:
        """Return which blocks are present, and count a use of them: value and TTL are renewed.

        Args:
            keys: Any.
            pinned: Pin those that are present for another TTL, within the limit of `put_blocks`.
                A use without it renews the block, not its pin.
        """
        ...

    async def unpin_blocks(self, keys: Sequence[bytes]) -> None:
        """Let blocks be evicted again, as if just used; absent ones are fine."""
        ...

    async def hottest(self, prefix: bytes, limit: int) -> list[bytes]:
        """Return at most `limit` keys that begin with `prefix`: pinned ones, then by value."""
        ...

    async def flush(self) -> int:
        """Forget every block of the namespace, in small steps; return how many."""
        ...

    async def stats(self) -> BlockStoreStats:
        """Return the books."""
        ...

    async def ping(self) -> None:
        """Return if the store answers."""
        ...

    async def close(self) -> None:
        """Let go of connections; what is stored stays."""
        ...
