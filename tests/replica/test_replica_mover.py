"""A mover in a thread, over a store in memory that can be told to misbehave."""

from __future__ import annotations

import asyncio
import time

import pytest
from mover_fakes import (
    HASHES,
    NBYTES,
    PREFIX,
    MemoryBlocks,
    carry_out,
    host_memory,
    mover_thread,
    receive,
    send,
)

from cluster.engine.mover import Move, MoveKind
from cluster.errors import UnavailableError
from cluster.kvstore.block_key import block_keys
from cluster.replica.mover import MAX_RUNNING

KEYS = block_keys(PREFIX, HASHES)


def test_put_writes_what_is_absent_in_pieces_and_touches_the_rest() -> None:
    blocks = MemoryBlocks({KEYS[1]: b"old" * 20})
    with host_memory(8, 2**15) as memory, mover_thread(blocks, memory, kv_chunk_bytes=2**16) as to:
        for slot in range(8):
            memory.slots[slot].fill_(slot)
        result = carry_out(to, MoveKind.PUT, HASHES[:6], (5, 4, 3, 2, 1, 0), is_pinned=True)
    assert result.found == (True,) * 6 and not result.error
    assert result.num_bytes == 5 * 2**15
    assert blocks.calls == [("touch", 6), ("put", 2), ("put", 2), ("put", 1)]
    assert blocks.blocks[KEYS[1]] == b"old" * 20
    for index, slot in ((0, 5), (2, 3), (3, 2), (4, 1), (5, 0)):
        assert blocks.blocks[KEYS[index]] == bytes([slot]) * 2**15
    assert blocks.pinned == set(KEYS[:6])
    assert blocks.positions == [0, 3, 5]


def test_get_fills_the_slots_of_what_is_there_and_whole() -> None:
    values = {KEYS[0]: b"a" * NBYTES, KEYS[2]: b"c" * (NBYTES - 1), KEYS[3]: b"d" * NBYTES}
    blocks = MemoryBlocks(values)
    with host_memory() as memory, mover_thread(blocks, memory) as to:
        memory.slots.fill_(9)
        result = carry_out(to, MoveKind.GET, HASHES[:4], (3, 1, 0, 6))
        assert result.found == (True, False, False, True)
        assert (result.num_bytes, result.num_corrupt, result.error) == (2 * NBYTES, 1, "")
        expected = [9, 9, 9, ord("a"), 9, 9, ord("d"), 9]
        assert [row.unique().tolist() for row in memory.slots] == [[byte] for byte in expected]


def test_put_writes_again_what_could_not_be_read() -> None:
    blocks = MemoryBlocks({KEYS[0]: b"a" * NBYTES, KEYS[1]: b"cut short"})
    with host_memory() as memory, mover_thread(blocks, memory) as to:
        assert carry_out(to, MoveKind.GET, HASHES[:2], (0, 1)).found == (True, False)
        memory.slots.fill_(7)
        assert carry_out(to, MoveKind.PUT, HASHES[:2], (0, 1)).num_bytes == NBYTES
        assert blocks.blocks == {KEYS[0]: b"a" * NBYTES, KEYS[1]: bytes([7]) * NBYTES}
        assert carry_out(to, MoveKind.PUT, HASHES[:2], (0, 1)).num_bytes == 0, "once is enough"


def test_find_asks_and_touches_nothing() -> None:
    blocks = MemoryBlocks({KEYS[1]: b""})
    with host_memory() as memory, mover_thread(blocks, memory) as to:
        assert carry_out(to, MoveKind.FIND, HASHES[:3]).found == (False, True, False)
    assert blocks.calls == [("has", 3)]


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (UnavailableError("the store is away"), "the store is away"),
        (RuntimeError("secret"), "RuntimeError"),
    ],
)
@pytest.mark.parametrize("kind", list(MoveKind))
def test_failure_of_the_store_is_an_answer(kind: MoveKind, failure: Exception, error: str) -> None:
    blocks = MemoryBlocks({KEYS[0]: b"a" * NBYTES})
    blocks.fails = failure
    with host_memory() as memory, mover_thread(blocks, memory) as to:
        result = carry_out(to, kind, slots=(0, 1))
        assert (result.error, result.found, result.num_bytes) == (error, (False, False), 0)
        blocks.fails = None
        assert not carry_out(to, kind, slots=(0, 1)).error


def test_slot_that_is_not_there_is_an_error_and_no_harm() -> None:
    blocks = MemoryBlocks({KEYS[0]: b"a" * NBYTES})
    with host_memory() as memory, mover_thread(blocks, memory) as to:
        assert carry_out(to, MoveKind.GET, HASHES[:1], (8,)).error == "ValueError"
        assert carry_out(to, MoveKind.GET, HASHES[:1], (7,)).found == (True,)


def test_store_that_never_answers_costs_one_deadline() -> None:
    blocks = MemoryBlocks()
    blocks.gate = asyncio.Event()
    with host_memory() as memory, mover_thread(blocks, memory, timeout_s=0.1) as to:
        result = carry_out(to, MoveKind.GET, slots=(0, 1))
        assert "store.timeout_s=0.1" in result.error
        assert 0.1 <= result.elapsed_s < 1.0


def test_moves_run_at_once_up_to_their_kinds_limit() -> None:
    blocks = MemoryBlocks()
    blocks.gate = asyncio.Event()
    with host_memory() as memory, mover_thread(blocks, memory, timeout_s=0.2) as to:
        num_gets = MAX_RUNNING[MoveKind.GET] + 1
        for move_id in range(num_gets):
            send(to, Move(move_id, MoveKind.GET, HASHES[:1], (0,)))
        send(to, Move(99, MoveKind.FIND, HASHES[:1]))  # does not queue behind them
        first = [receive(to) for _ in range(num_gets)]
        assert {result.move_id for result in first} == {*range(num_gets - 1), 99}
        assert receive(to).elapsed_s >= 0.4
        assert blocks.most_running == num_gets


def test_mover_ends_in_the_middle_of_a_call() -> None:
    blocks = MemoryBlocks()
    blocks.gate = asyncio.Event()
    with host_memory() as memory, mover_thread(blocks, memory, timeout_s=60) as to:
        send(to, Move(0, MoveKind.GET, HASHES[:1], (0,)))
        send(to, Move(1, MoveKind.FIND, ()))
        deadline_s = time.monotonic() + 5
        while len(blocks.calls) < 2:
            assert time.monotonic() < deadline_s
        to.channel.close()
        assert blocks.is_closed.wait(2)
        assert blocks.num_running == 0
