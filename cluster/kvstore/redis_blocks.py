"""KV blocks in Redis, within a byte budget that Sluice keeps itself, whatever `maxmemory` says.

    {ns:s00}:v2:block:KEY      string, PX    a framed block (codec.py), KEY as in block_key.py
    {ns:s00}:v2:order          zset          blocks that may be evicted, by value (eviction.py)
    {ns:s00}:v2:pinned         zset          blocks that may not, by when that ends
    {ns:s00}:v2:books          hash          block -> cost, uses, position; '' -> their sums
    {ns:s00}:v2:graves         list          indexes of the past, whose blocks are being dropped

One server has one shard. In a cluster there are 16, each with its part of the budget, and a suffix
in the tag that spreads them evenly over the slots; a block's hash says in which it lies. What lies
in shards of a server that failed is missing; a call fails where all that it asked did. Scripts
(redis_block_scripts.py) evict and count in the same atomic step that writes. Every operation but
`flush` and `hottest` is one round trip with one deadline, nothing is retried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.crc import key_slot

from cluster.clock import WallClock
from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.kvstore.block_key import hash_of_key
from cluster.kvstore.block_store import BlockStoreStats, Buffer, FetchedBlocks, nbytes
from cluster.kvstore.budget import block_cost
from cluster.kvstore.codec import Frame, encode_block, open_frame
from cluster.kvstore.redis_block_scripts import (
    ADMIT_BLOCKS,
    BLOCK_STATS,
    FLUSH_BLOCKS,
    SHRINK,
    TOUCH_BLOCKS,
    UNPIN_BLOCKS,
)
from cluster.kvstore.redis_connection import Command
from cluster.kvstore.redis_link import Batch, RedisLink, RedisMemoryError
from cluster.kvstore.redis_replies import OnValue
from cluster.kvstore.redis_route import NUM_SLOTS
from cluster.kvstore.redis_url import parse_redis_url

NUM_CLUSTER_SHARDS = 16
_SCRIPT_BLOCKS = 256  # that one script handles: no other client waits longer than that takes
_PAGE_BLOCKS = 1024  # of `hottest` and `flush`, for the same reason
_MAX_PAGES = 64  # of `hottest`, per shard: with blocks of many models it may find fewer

_BROKEN = Frame(b"", memoryview(b""))  # it fits no key


@dataclass(frozen=True, slots=True)
class _Shard:
    prefix: bytes  # of all its keys

    def block(self, key: bytes) -> bytes:
        return self.prefix + b"block:" + key

    def script(self, text: str, *arguments: Any) -> Command:
        keys = [self.prefix + name for name in (b"order", b"pinned", b"books", b"graves")]
        return ("EVAL", text, len(keys), *keys, self.block(b""), *arguments)


class RedisBlocks:
    """The `BlockStore` protocol on a Redis; belongs to the event loop that first uses it.

    Args:
        config: `resolved_kv_url` says where; no connection is made before the first call.

    Raises:
        ConfigError: The URL cannot be read.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        field = "store.kv_url" if config.kv_url else "store.url"
        target = parse_redis_url(config.resolved_kv_url, field)
        self._link = RedisLink(target, config.timeout_s, WallClock())
        num_shards = NUM_CLUSTER_SHARDS if self._link.is_cluster else 1
        self._shards = [
            _Shard(_shard_tag(config.namespace, shard, num_shards).encode() + b":v2:")
            for shard in range(num_shards)
        ]
        self._ttl_ms = max(1, round(config.kv_ttl_s * 1000))
        self._books = (self._ttl_ms, config.max_bytes // num_shards)
        self._largest_bytes = 0  # of a value so far

    async def put_blocks(
        self, blocks: Mapping[bytes, Buffer], *, pinned: bool = False, position: int = 0
    ) -> list[bool]:
        """Write a chain's blocks, first one first; return which are stored now.

        Args:
            blocks: By key.
            pinned: Spare them, as long as these are at most half of the budget.
            position: Place of the first one in its chain.
        """
        places = {key: place for place, key in enumerate(blocks, position)}
        batches, keys_of_batches = [], []
        for shard, keys in self._by_shard(blocks):
            commands: list[Command] = []
            arguments: list[Any] = [*self._books, int(pinned)]
            for key in keys:
                data = encode_block(blocks[key], key)
                self._largest_bytes = max(self._largest_bytes, len(data))
                commands.append(("SET", shard.block(key), data, "PX", self._ttl_ms))
                arguments += (key, _cost(blocks[key]), min(places[key], 65535))
            commands.append(shard.script(ADMIT_BLOCKS, *arguments))
            # No other client sees a block that is counted and missing, or the reverse.
            batches.append(Batch(shard.prefix, commands, is_atomic=True))
            keys_of_batches.append(keys)
        try:
            outcomes = await self._link.run_some("put_blocks", *batches)
        except RedisMemoryError:
            await self._shrink(sum(map(_cost, blocks.values())))
            raise
        stored: dict[bytes, bool] = {}
        refused: list[bytes] = []
        for keys, outcome in zip(keys_of_batches, outcomes, strict=True):
            if isinstance(outcome, RedisMemoryError):
                refused += keys
            elif not isinstance(outcome, UnavailableError):
                stored |= zip(keys, map(bool, outcome[-1]), strict=True)
        if refused:
            await self._shrink(sum(_cost(blocks[key]) for key in refused))
        return [stored.get(key, False) for key in blocks]

    async def get_blocks(self, keys: Sequence[bytes]) -> FetchedBlocks:
        """Return the bytes of each block, bit-exact, and count this as a use of those found."""
        # A reply is at most a chunk, so that Redis serves others between two; touching comes after
        # all reads, since it may drop what was found.
        values = await self._ask(
            "get_blocks",
            keys,
            lambda shard, keys: [*self._reads(shard, keys), *self._touches(shard, keys, 0)],
            on_value=_opened,
        )
        return self._fetched(keys, values)

    async def has_blocks(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks are present; no use is counted."""
        found = await self._ask(
            "has_blocks",
            keys,
            lambda shard, keys: [("EXISTS", shard.block(key)) for key in keys],
        )
        return [bool(found.get(key)) for key in keys]

    async def touch_blocks(self, keys: Sequence[bytes], *, pinned: bool = False) -> list[bool]:
        """Return which blocks are present, and count a use of them: value and TTL are renewed."""
        found = await self._ask(
            "touch_blocks", keys, lambda shard, keys: self._touches(shard, keys, int(pinned))
        )
        return [bool(found.get(key)) for key in keys]

    async def unpin_blocks(self, keys: Sequence[bytes]) -> None:
        """Let blocks be evicted again, as if just used; absent ones are fine."""
        batches = [
            Batch(
                shard.prefix,
                [shard.script(UNPIN_BLOCKS, *self._books, *piece) for piece in _pieces(shard_keys)],
            )
            for shard, shard_keys in self._by_shard(dict.fromkeys(keys))
        ]
        await self._link.run_some("unpin_blocks", *batches)

    async def hottest(self, prefix: bytes, limit: int) -> list[bytes]:
        """Return at most `limit` keys that begin with `prefix`: pinned ones, then by value."""
        found: list[bytes] = []
        for index in ("pinned", "order"):
            ranked: list[tuple[float, bytes]] = []
            for shard in self._shards:
                ranked += await self._highest(shard, index, prefix, limit)
            ranked.sort(key=lambda item: (-item[0], item[1]))
            found += [key for _, key in ranked]
        return found[:limit]

    async def flush(self) -> int:
        """Forget every block of the namespace, in small steps; return how many."""
        num_dropped = 0
        for shard in self._shards:
            batch = Batch(shard.prefix, [shard.script(FLUSH_BLOCKS, *self._books, _PAGE_BLOCKS)])
            while True:
                (((dropped, has_more),),) = await self._link.run("flush", batch)
                num_dropped += dropped
                if not has_more:
                    break
        return num_dropped

    async def stats(self) -> BlockStoreStats:
        """Return the books, the sums over all shards."""
        batches = [Batch(shard.prefix, [shard.script(BLOCK_STATS)]) for shard in self._shards]
        rows = [row for (row,) in await self._link.run("stats", *batches)]
        used, blocks, pinned, evicted = (sum(column) for column in zip(*rows, strict=True))
        return BlockStoreStats(used, self._config.max_bytes, blocks, pinned, evicted)

    async def ping(self) -> None:
        """Return if a server with a shard answers."""
        batches = [Batch(shard.prefix, [("PING",)]) for shard in self._shards]
        await self._link.run_some("ping", *batches)

    async def close(self) -> None:
        """Close the connections; what is stored stays."""
        await self._link.close()

    def _by_shard(self, keys: Iterable[bytes]) -> list[tuple[_Shard, list[bytes]]]:
        """Return keys by their shard, in order; none for no keys."""
        groups: dict[int, list[bytes]] = {}
        for key in keys:
            # The part of the key that differs evenly between blocks, but not between their parts.
            shard = int.from_bytes(hash_of_key(key)[:4], "little") % len(self._shards)
            groups.setdefault(shard, []).append(key)
        return [(self._shards[shard], group) for shard, group in sorted(groups.items())]

    async def _ask(
        self,
        name: str,
        keys: Sequence[bytes],
        commands_of: Callable[[_Shard, list[bytes]], list[Command]],
        on_value: OnValue | None = None,
    ) -> dict[bytes, Any]:
        """Return what the commands of each shard reply first, a value per key; none for keys of
        shards whose server failed."""
        groups = self._by_shard(dict.fromkeys(keys))
        batches = [Batch(shard.prefix, commands_of(shard, group)) for shard, group in groups]
        found: dict[bytes, Any] = {}
        outcomes = await self._link.run_some(name, *batches, on_value=on_value)
        for (_, group), answers in zip(groups, outcomes, strict=True):
            if isinstance(answers, UnavailableError):
                continue
            flat = [
                value
                for answer in answers
                for value in (answer if isinstance(answer, list) else (answer,))
            ]
            found |= zip(group, flat, strict=False)
        return found

    def _reads(self, shard: _Shard, keys: list[bytes]) -> list[Command]:
        names = [shard.block(key) for key in keys]
        chunk = max(1, self._config.kv_chunk_bytes // max(1, self._largest_bytes))
        if not self._largest_bytes:  # nothing is known yet
            chunk = 1
        return [("MGET", *names[start : start + chunk]) for start in range(0, len(names), chunk)]

    def _touches(self, shard: _Shard, keys: list[bytes], pins: int) -> list[Command]:
        return [shard.script(TOUCH_BLOCKS, *self._books, pins, *piece) for piece in _pieces(keys)]

    def _fetched(self, keys: Sequence[bytes], frames: dict[bytes, Frame | None]) -> FetchedBlocks:
        # A frame names its block: another's is a miss.
        values: dict[bytes, Buffer | None] = {
            key: frame.payload if frame is not None and frame.fingerprint == key else None
            for key, frame in frames.items()
        }
        found = [frame for frame in frames.values() if frame is not None]
        sizes = [frame.payload.nbytes for frame in found]
        self._largest_bytes = max(self._largest_bytes, *sizes, 0)
        num_corrupt = len(found) - sum(value is not None for value in values.values())
        return FetchedBlocks([values.get(key) for key in keys], num_corrupt)

    async def _highest(
        self, shard: _Shard, index: str, prefix: bytes, limit: int
    ) -> list[tuple[float, bytes]]:
        """Return the most valuable blocks of a prefix in an index, with their values."""
        found: list[tuple[float, bytes]] = []
        name = shard.prefix + index.encode()
        for page in range(_MAX_PAGES):
            start = page * _PAGE_BLOCKS
            read: Command = ("ZREVRANGE", name, start, start + _PAGE_BLOCKS - 1, "WITHSCORES")
            ((flat,),) = await self._link.run("hottest", Batch(shard.prefix, [read]))
            pairs = zip(flat[::2], flat[1::2], strict=True)
            found += [(float(value), key) for key, value in pairs if key.startswith(prefix)]
            if len(found) >= limit or len(flat) < 2 * _PAGE_BLOCKS:
                break
        return found[:limit]

    async def _shrink(self, num_bytes: int) -> None:
        share = num_bytes // len(self._shards) + 1
        await self._link.run_some(
            "shrink",
            *(
                Batch(shard.prefix, [shard.script(SHRINK, *self._books, share)])
                for shard in self._shards
            ),
        )


def _opened(value: bytes | bytearray) -> Frame:
    return open_frame(value) or _BROKEN


def _cost(value: Buffer) -> int:
    return block_cost(nbytes(value))


def _pieces(keys: list[bytes]) -> list[list[bytes]]:
    return [keys[start : start + _SCRIPT_BLOCKS] for start in range(0, len(keys), _SCRIPT_BLOCKS)]


def _shard_tag(namespace: str, shard: int, num_shards: int) -> str:
    """Return the hash tag of a shard: its slot is in the shard's own part of all slots."""
    if num_shards == 1:
        return f"{{{namespace}:s{shard:02}}}"
    part = NUM_SLOTS // num_shards
    suffix = 0
    while key_slot(f"{namespace}:s{shard:02}.{suffix}".encode()) // part != shard:
        suffix += 1
    return f"{{{namespace}:s{shard:02}.{suffix}}}"
