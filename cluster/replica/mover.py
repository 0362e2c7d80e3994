"""The mover: carries blocks between one worker's host tier and the store, beside the computation.

    leader ──("move", id, kind, hashes, slots, is_pinned)──► mover ──► store
           ◄──("moved", id, found, seconds, bytes, corrupt, error)──┘  └──► slots, shared memory

Each move has the store's deadline from its turn on, and every one is answered. A search does not
queue behind transfers, nor a read behind writes. The mover ends when its peer is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from cluster.config import StoreConfig
from cluster.engine.mover import Move, MoveKind, MoveResult
from cluster.errors import SluiceError, UnavailableError
from cluster.kvstore.block_key import block_keys
from cluster.kvstore.block_store import BlockStore
from cluster.replica.channel import Channel

logger = logging.getLogger(__name__)

MAX_RUNNING = {MoveKind.FIND: 16, MoveKind.GET: 8, MoveKind.PUT: 4}
"""Moves at once, by kind: enough to keep a store busy, few enough for each to be in time."""

MAX_MISSED = 4096
"""Blocks that could not be read, which are remembered until they are written again."""

CLOSE_S = 0.5


class Mover:
    """Serves one leader.

    Args:
        channel: To the leader; the mover closes it.
        slots: Bytes of the host tier, writable.
        block_nbytes: Of a slot.
        store: Where blocks are; the mover closes it.
        prefix: Of this worker's keys.
        config: Deadline and the bytes that one call writes.
    """

    def __init__(
        self,
        channel: Channel,
        slots: memoryview,
        *,
        block_nbytes: int,
        store: BlockStore,
        prefix: bytes,
        config: StoreConfig,
    ) -> None:
        self._channel = channel
        self._slots = slots
        self._block_nbytes = block_nbytes
        self._store = store
        self._prefix = prefix
        self._timeout_s = config.timeout_s
        self._piece_blocks = max(1, config.kv_chunk_bytes // block_nbytes)
        self._turns = {kind: asyncio.Semaphore(limit) for kind, limit in MAX_RUNNING.items()}
        self._tasks: set[asyncio.Task[None]] = set()  # as many as the leader has open
        self._missed: dict[bytes, None] = {}  # keys: gone, or there and damaged
        self._is_over = asyncio.Event()

    async def serve(self) -> None:
        """Answer moves until the leader is gone, or `end` is called."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._receive)
        try:
            await self._is_over.wait()
        finally:
            loop.remove_reader(self._channel.fileno())
            self._channel.close()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=CLOSE_S)
            with contextlib.suppress(SluiceError, TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._store.close()

    def end(self) -> None:
        """Let `serve` return, whatever is under way."""
        self._is_over.set()

    def _receive(self) -> None:
        try:
            # Messages are short and sent whole: what has begun to arrive is there.
            kind, move_id, what, hashes, slots, is_pinned = self._channel.receive()
        except UnavailableError:
            self.end()
            return
        assert kind == "move", kind
        move = Move(move_id, MoveKind(what), hashes, slots, is_pinned)
        task = asyncio.get_running_loop().create_task(self._run(move))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, move: Move) -> None:
        loop = asyncio.get_running_loop()
        arrived_s = loop.time()
        async with self._turns[move.kind]:
            deadline_s = loop.time() + self._timeout_s
            try:
                async with asyncio.timeout_at(deadline_s):
                    found, num_bytes, num_corrupt = await self._carry_out(move, deadline_s)
                error = ""
            except TimeoutError:
                error = f"no answer within store.timeout_s={self._timeout_s:g}"
            except SluiceError as failure:
                error = str(failure)
            except Exception as failure:  # whatever a store does, the leader gets its answer
                logger.exception("a move failed")
                error = type(failure).__name__
            if error:
                found, num_bytes, num_corrupt = [False] * len(move.hashes), 0, 0
            elapsed_s = loop.time() - arrived_s
            self._answer(
                MoveResult(move.move_id, tuple(found), elapsed_s, num_bytes, num_corrupt, error)
            )

    def _answer(self, result: MoveResult) -> None:
        try:
            self._channel.send(
                "moved",
                result.move_id,
                result.found,
                result.elapsed_s,
                result.num_bytes,
                result.num_corrupt,
                result.error,
            )
        except UnavailableError:
            self.end()

    async def _carry_out(self, move: Move, deadline_s: float) -> tuple[list[bool], int, int]:
        """Return what was found, bytes moved, and blocks that did not verify."""
        keys = block_keys(self._prefix, move.hashes)
        if not keys:  # the engine tries whether the store answers again
            await self._store.ping()
            return [], 0, 0
        if move.kind is MoveKind.FIND:
            return await self._store.has_blocks(keys), 0, 0
        if move.kind is MoveKind.GET:
            return await self._get(keys, move.slots, deadline_s)
        return await self._put(keys, move)

    async def _get(
        self, keys: Sequence[bytes], slots: Sequence[int], deadline_s: float
    ) -> tuple[list[bool], int, int]:
        fetched = await self._store.get_blocks(keys)
        if asyncio.get_running_loop().time() > deadline_s:
            # This process was held up. A leader that gave it up may use the slots for others.
            raise TimeoutError
        found, num_corrupt = [], fetched.num_corrupt
        for key, value, slot in zip(keys, fetched.values, slots, strict=True):
            is_whole = value is not None and memoryview(value).nbytes == self._block_nbytes
            found.append(is_whole)
            if is_whole and value is not None:
                self._slot(slot)[:] = value
                continue
            num_corrupt += value is not None
            self._missed[key] = None
            if len(self._missed) > MAX_MISSED:
                del self._missed[next(iter(self._missed))]
        return found, sum(found) * self._block_nbytes, num_corrupt

    async def _put(self, keys: Sequence[bytes], move: Move) -> tuple[list[bool], int, int]:
        there = await self._store.touch_blocks(keys, pinned=move.is_pinned)
        # What was there and could not be read would be touched, and missed, for ever.
        found = [
            is_there and key not in self._missed for key, is_there in zip(keys, there, strict=True)
        ]
        absent = [index for index, is_there in enumerate(found) if not is_there]
        for start in range(0, len(absent), self._piece_blocks):
            piece = absent[start : start + self._piece_blocks]
            blocks = {keys[index]: self._slot(move.slots[index]) for index in piece}
            stored = await self._store.put_blocks(blocks, pinned=move.is_pinned, position=piece[0])
            for index, is_stored in zip(piece, stored, strict=True):
                found[index] = is_stored
                self._missed.pop(keys[index], None)
        num_written = sum(found[index] for index in absent)
        return found, num_written * self._block_nbytes, 0

    def _slot(self, slot: int) -> memoryview:
        start = slot * self._block_nbytes
        return self._slots[start : start + self._block_nbytes]
