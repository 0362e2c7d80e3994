"""A block store in memory that can be told to misbehave, and a mover in a thread over it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cluster.config import StoreConfig
from cluster.engine.mover import Move, MoveKind, MoveResult
from cluster.kvstore.block_store import BlockStoreStats, Buffer, FetchedBlocks
from cluster.replica.host_memory import HostMemory
from cluster.replica.mover_start import MoverHandle, MoverSpec, start_mover

NBYTES = 64
PREFIX = b"0123456789"
HASHES = tuple(bytes([i]) * 16 for i in range(8))


class MemoryBlocks:
    """The `BlockStore` protocol on a dictionary."""

    def __init__(self, blocks: dict[bytes, bytes] | None = None) -> None:
        self.blocks = blocks if blocks is not None else {}
        self.pinned: set[bytes] = set()
        self.positions: list[int] = []  # of the calls of put_blocks
        self.calls: list[tuple[str, int]] = []  # method, keys
        self.num_running = self.most_running = 0
        self.gate: asyncio.Event | None = None  # a call waits for it
        self.fails: Exception | None = None
        self.is_closed = threading.Event()

    async def _enter(self, method: str, num_keys: int) -> None:
        self.calls.append((method, num_keys))
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.fails is not None:
                raise self.fails
        finally:
            self.num_running -= 1

    async def put_blocks(
        self, blocks: Mapping[bytes, Buffer], *, pinned: bool = False, position: int = 0
    ) -> list[bool]:
        await self._enter("put", len(blocks))
        self.positions.append(position)
        self.blocks |= {key: bytes(value) for key, value in blocks.items()}
        self.pinned |= set(blocks) if pinned else set()
        return [True] * len(blocks)

    async def get_blocks(self, keys: Sequence[bytes]) -> FetchedBlocks:
        await self._enter("get", len(keys))
        return FetchedBlocks([self.blocks.get(key) for key in keys])

    async def has_blocks(self, keys: Sequence[bytes]) -> list[bool]:
        await self._enter("has", len(keys))
        return [key in self.blocks for key in keys]

    async def touch_blocks(self, keys: Sequence[bytes], *, pinned: bool = False) -> list[bool]:
        await self._enter("touch", len(keys))
        found = [key in self.blocks for key in keys]
        self.pinned |= {key for key in keys if key in self.blocks} if pinned else set()
        return found

    async def unpin_blocks(self, keys: Sequence[bytes]) -> None:
        self.pinned -= set(keys)

    async def hottest(self, prefix: bytes, limit: int) -> list[bytes]:
        await self._enter("hottest", limit)
        return [key for key in self.blocks if key.startswith(prefix)][:limit]

    async def flush(self) -> int:
        num_blocks = len(self.blocks)
        self.blocks.clear()
        return num_blocks

    async def stats(self) -> BlockStoreStats:
        return BlockStoreStats(0, 1, len(self.blocks), len(self.pinned), 0)

    async def ping(self) -> None:
        await self._enter("ping", 0)

    async def close(self) -> None:
        self.is_closed.set()


def spec_of(store: StoreConfig, *, block_nbytes: int = NBYTES) -> MoverSpec:
    return MoverSpec(store.model_dump(), PREFIX, block_nbytes)


@contextlib.contextmanager
def host_memory(num_slots: int = 8, block_nbytes: int = NBYTES) -> Iterator[HostMemory]:
    memory = HostMemory(num_slots, block_nbytes)
    try:
        yield memory
    finally:
        memory.close()


@contextlib.contextmanager
def mover_thread(
    blocks: MemoryBlocks, memory: HostMemory, **config: object
) -> Iterator[MoverHandle]:
    store = StoreConfig(**config)  # type: ignore[arg-type]
    handle = start_mover(spec_of(store, block_nbytes=memory.block_nbytes), memory, lambda: blocks)
    assert handle is not None
    try:
        yield handle
    finally:
        handle.close()
        assert blocks.is_closed.wait(5), "the mover did not end"


def send(handle: MoverHandle, move: Move) -> None:
    handle.channel.send(
        "move", move.move_id, move.kind.value, move.hashes, move.slots, move.is_pinned
    )


def receive(handle: MoverHandle) -> MoveResult:
    kind, *row = handle.channel.receive()
    assert kind == "moved"
    return MoveResult(*row)


def carry_out(
    handle: MoverHandle,
    kind: MoveKind,
    hashes: Sequence[bytes] = HASHES[:2],
    slots: Sequence[int] = (),
    *,
    is_pinned: bool = False,
) -> MoveResult:
    send(handle, Move(7, kind, tuple(hashes), tuple(slots), is_pinned))
    result = receive(handle)
    assert result.move_id == 7
    return result


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class ScriptedMover:
    """A `BlockMover` that finds everything when it is let."""

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.is_silent = False
        self.error = ""
        self._open: list[Move] = []

    def submit(self, move: Move) -> None:
        self.moves.append(move)
        self._open.append(move)

    def collect(self, timeout_s: float) -> list[MoveResult]:
        if self.is_silent:
            return []
        ended, self._open = self._open, []
        return [
            MoveResult(move.move_id, (not self.error,) * len(move.hashes), 0.001, error=self.error)
            for move in ended
        ]

    def shutdown(self) -> None:
        self._open.clear()
