"""Ways of moving blocks to and from Redis: through Sluice, and as plain redis-py would move them.

redis_py   pipelines of SET, MGET; hiredis parses. Nothing is checked, counted or evicted
blocks     `RedisBlocks`: frame, checksum, books and budget, in this process
mover      the same in a process of its own, from and to slots of a host tier
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from redis import Redis

from cluster.clock import WallClock
from cluster.config import StoreConfig
from cluster.engine.mover import Move, MoveKind
from cluster.errors import SluiceError, UnavailableError
from cluster.kvstore.block_key import block_keys, part_prefix
from cluster.kvstore.block_store import Buffer
from cluster.kvstore.redis_blocks import RedisBlocks
from cluster.replica.host_memory import HostMemory
from cluster.replica.mover_link import MoverLink
from cluster.replica.mover_start import MoverSpec, start_mover

MOVES_AT_ONCE = 8
"""An engine begins all moves of a prompt at once; its mover runs so many."""

_PREFIX = part_prefix(b"bench", pp=1, part=0)


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks that travel in one call."""

    hashes: list[bytes]
    values: list[bytes]


@dataclass(frozen=True, slots=True)
class Series:
    """Batches that were moved."""

    bytes_per_s: float
    latencies_s: list[float]  # of each batch, from its beginning


class BytesPath(Protocol):
    """One way of moving blocks."""

    def put(self, batches: Sequence[Batch]) -> Series:
        """Write batches."""
        ...

    def get(self, batches: Sequence[Batch]) -> Series:
        """Read what `put` wrote; raises `SluiceError` where that is something else."""
        ...

    def clear(self, batches: Sequence[Batch]) -> None:
        """Remove what was written."""
        ...

    def close(self) -> None:
        """Let go of connections and processes."""
        ...


class RawRedis:
    """redis-py with hiredis, one batch after the other.

    Args:
        url: Of the server.
        namespace: Of the keys.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self._redis: Any = Redis.from_url(url, protocol=2)
        self._prefix = f"{namespace}:raw:".encode()

    def put(self, batches: Sequence[Batch]) -> Series:
        """Write each batch as one pipeline of SET."""
        return _one_by_one(batches, self._set)

    def get(self, batches: Sequence[Batch]) -> Series:
        """Read each batch as one MGET."""
        found: list[Any] = []
        series = _one_by_one(
            batches, lambda batch: found.append(self._redis.mget(self._keys(batch)))
        )
        _check(batches, found)
        return series

    def clear(self, batches: Sequence[Batch]) -> None:
        """Remove what was written."""
        for batch in batches:
            self._redis.delete(*self._keys(batch))

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

    def _set(self, batch: Batch) -> None:
        with self._redis.pipeline(transaction=False) as pipeline:
            for key, value in zip(self._keys(batch), batch.values, strict=True):
                pipeline.set(key, value)
            pipeline.execute()

    def _keys(self, batch: Batch) -> list[bytes]:
        return [self._prefix + block_hash for block_hash in batch.hashes]


class DirectBlocks:
    """`RedisBlocks` in this process, one batch after the other.

    Args:
        config: Of the store.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._runner = asyncio.Runner()
        self._blocks = RedisBlocks(config)

    def put(self, batches: Sequence[Batch]) -> Series:
        """Write each batch in one call."""
        return self._runner.run(self._put(batches))

    def get(self, batches: Sequence[Batch]) -> Series:
        """Read each batch in one call."""
        return self._runner.run(self._get(batches))

    def clear(self, batches: Sequence[Batch]) -> None:
        """Remove what was written."""
        self._runner.run(self._blocks.flush())

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._blocks.close())
        self._runner.close()

    async def _put(self, batches: Sequence[Batch]) -> Series:
        start_s, latencies_s = time.perf_counter(), []
        for batch in batches:
            began_s = time.perf_counter()
            keys = block_keys(_PREFIX, batch.hashes)
            stored = await self._blocks.put_blocks(dict(zip(keys, batch.values, strict=True)))
            latencies_s.append(time.perf_counter() - began_s)
            if not all(stored):
                raise SluiceError(f"{stored.count(False)} blocks of the benchmark were not stored")
        return _series(batches, time.perf_counter() - start_s, latencies_s)

    async def _get(self, batches: Sequence[Batch]) -> Series:
        found: list[list[Buffer | None]] = []
        start_s, latencies_s = time.perf_counter(), []
        for batch in batches:
            began_s = time.perf_counter()
            found.append((await self._blocks.get_blocks(block_keys(_PREFIX, batch.hashes))).values)
            latencies_s.append(time.perf_counter() - began_s)
        series = _series(batches, time.perf_counter() - start_s, latencies_s)
        _check(batches, found)
        return series


class MoverBlocks:
    """A mover's process, `MOVES_AT_ONCE` moves at a time, as an engine asks it.

    Args:
        config: Of the store.
        block_nbytes: Of a block.
        num_slots: Blocks of all batches together.
    """

    def __init__(self, config: StoreConfig, *, block_nbytes: int, num_slots: int) -> None:
        self._memory = HostMemory(num_slots, block_nbytes)
        self._block_nbytes = block_nbytes
        spec = MoverSpec(config.model_dump(), _PREFIX, block_nbytes)
        handle = start_mover(spec, self._memory)
        assert handle is not None, "the benchmark has a store"
        self._handle = handle
        self._timeout_s = config.timeout_s
        self._link = MoverLink([handle.channel], timeout_s=config.timeout_s, clock=WallClock())
        self._cleaner = DirectBlocks(config)
        self._move_ids = count()
        self._run(MoveKind.FIND, [()], [()])  # it has started, and knows its store

    def put(self, batches: Sequence[Batch]) -> Series:
        """Write each batch in one move."""
        view = self._memory.view()
        for slot, value in enumerate(value for batch in batches for value in batch.values):
            view[slot * self._block_nbytes : (slot + 1) * self._block_nbytes] = value
        return self._move(MoveKind.PUT, batches)

    def get(self, batches: Sequence[Batch]) -> Series:
        """Read each batch in one move."""
        self._memory.slots.zero_()
        series = self._move(MoveKind.GET, batches)
        view, size = self._memory.view(), self._block_nbytes
        _check(
            batches,
            [
                [view[slot * size : (slot + 1) * size] for slot in slots]
                for slots in _slots_of(batches)
            ],
        )
        return series

    def clear(self, batches: Sequence[Batch]) -> None:
        """Remove what was written."""
        self._cleaner.clear(batches)

    def close(self) -> None:
        """End the mover."""
        self._link.shutdown()
        self._handle.close()
        self._cleaner.close()
        self._memory.close()

    def _move(self, kind: MoveKind, batches: Sequence[Batch]) -> Series:
        start_s = time.perf_counter()
        hashes = [tuple(batch.hashes) for batch in batches]
        latencies_s = self._run(kind, hashes, _slots_of(batches))
        return _series(batches, time.perf_counter() - start_s, latencies_s)

    def _run(
        self,
        kind: MoveKind,
        hashes: Sequence[tuple[bytes, ...]],
        slots: Sequence[tuple[int, ...]],
    ) -> list[float]:
        """Return how long each move took; raises where one failed."""
        due = list(zip(hashes, slots, strict=True))
        num_open = 0
        latencies_s: list[float] = []
        deadline_s = time.monotonic() + 10 * self._timeout_s
        while due or num_open:
            while due and num_open < MOVES_AT_ONCE:
                move = Move(next(self._move_ids), kind, *due.pop(0))
                self._link.submit(move)
                num_open += 1
            for result in self._link.collect(1.0):
                num_open -= 1
                if not all(result.found):
                    raise SluiceError(f"a move of the benchmark failed: {result.error or kind}")
                latencies_s.append(result.elapsed_s)
            if time.monotonic() > deadline_s:
                raise UnavailableError(f"{num_open} moves of the benchmark did not end")
        return latencies_s


def _slots_of(batches: Sequence[Batch]) -> list[tuple[int, ...]]:
    slots, start = [], 0
    for batch in batches:
        slots.append(tuple(range(start, start + len(batch.hashes))))
        start += len(batch.hashes)
    return slots


def _one_by_one(batches: Sequence[Batch], move: Callable[[Batch], None]) -> Series:
    start_s, latencies_s = time.perf_counter(), []
    for batch in batches:
        began_s = time.perf_counter()
        move(batch)
        latencies_s.append(time.perf_counter() - began_s)
    return _series(batches, time.perf_counter() - start_s, latencies_s)


def _series(batches: Sequence[Batch], wall_s: float, latencies_s: list[float]) -> Series:
    num_bytes = sum(len(value) for batch in batches for value in batch.values)
    return Series(num_bytes / wall_s, latencies_s)


def _check(batches: Sequence[Batch], found: Sequence[Sequence[Buffer | None]]) -> None:
    """Raise where what was read is not what was written."""
    for batch, values in zip(batches, found, strict=True):
        for expected, value in zip(batch.values, values, strict=True):
            if value is None or memoryview(value) != memoryview(expected):
                raise SluiceError("a block of the benchmark came back missing or changed")
