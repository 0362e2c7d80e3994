from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from cluster.kvstore.redis_replies import SCRATCH_BYTES, ReplyReader


class Transport:
    """What the reader needs of one."""

    is_aborted = False

    def set_protocol(self, protocol: object) -> None:
        self.protocol = protocol

    def abort(self) -> None:
        self.is_aborted = True


def attached() -> tuple[ReplyReader, Transport]:
    reader, transport = ReplyReader(), Transport()
    reader.attach(transport)  # type: ignore[arg-type]
    assert transport.protocol is reader
    return reader, transport


def feed(reader: ReplyReader, data: bytes, pieces: list[int]) -> None:
    """Write as a socket does: never more than the reader's buffer takes, and never nothing."""
    position = 0
    while position < len(data):
        buffer = reader.get_buffer(-1)
        assert len(buffer) > 0, "a socket that reads nothing takes it for the end"
        size = min(len(buffer), len(data) - position, pieces.pop(0) if pieces else len(data))
        buffer[:size] = data[position : position + size]
        position += size
        reader.buffer_updated(size)


def encoded(value: Any) -> bytes:
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, list):
        return b"*%d\r\n" % len(value) + b"".join(map(encoded, value))
    return b"$%d\r\n" % len(value) + value + b"\r\n"


def read(values: list[Any], pieces: list[int]) -> list[Any]:
    async def run() -> list[Any]:
        reader, _ = attached()
        replies = reader.expect(len(values))
        feed(reader, b"".join(map(encoded, values)), pieces)
        return await replies

    return asyncio.run(run())


simple = st.one_of(st.none(), st.integers(-(2**60), 2**60), st.binary(max_size=30))
values = st.recursive(simple, lambda inner: st.lists(inner, max_size=4), max_leaves=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(values, min_size=1, max_size=6), st.lists(st.integers(1, 9), max_size=80))
def test_replies_come_whole_however_they_are_cut(sent: list[Any], pieces: list[int]) -> None:
    assert read(sent, pieces) == sent


@pytest.mark.parametrize("seed", range(12))
def test_replies_of_large_values_come_whole_however_they_are_cut(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [
        SCRATCH_BYTES + chance.randrange(-20, 20),
        SCRATCH_BYTES // 2 + chance.randrange(-20, 20),
        *(chance.choice((0, 3, 70_000, 200_000, 700_000)) for _ in range(8)),
    ]
    sent: list[Any] = [[chance.randbytes(size) for size in sizes], 7, chance.randbytes(90_000)]
    pieces = [chance.choice((1, 2, 9, 4000, 66_000, 250_000)) for _ in range(60)]
    assert read(sent, pieces) == sent


def test_replies_of_values_that_end_at_the_very_end_of_the_buffer() -> None:
    for missing in range(-14, 5):  # the line of such a value has 9 bytes, its end 2
        sent = [bytes(SCRATCH_BYTES + missing), b"next"]
        assert read(sent, [SCRATCH_BYTES, 1, 1, 1, 1]) == sent


async def test_replies_that_are_errors_are_values_and_states_are_texts() -> None:
    reader, _ = attached()
    replies = reader.expect(3)
    feed(reader, b"+OK\r\n-ERR no \xff\r\n*2\r\n:1\r\n-OOM over\r\n", [])
    ok, error, (one, inner) = await replies
    assert (ok, one) == (b"OK", 1)
    assert isinstance(error, ResponseError) and str(error) == "ERR no \N{REPLACEMENT CHARACTER}"
    assert isinstance(inner, ResponseError) and str(inner) == "OOM over"


async def test_replies_are_those_to_the_call_in_turn() -> None:
    reader, _ = attached()
    for round in range(3):
        replies = reader.expect(2)
        feed(reader, b":%d\r\n$100000\r\n" % round + bytes(100_000), [])
        # The end of the value's line comes with the next replies.
        assert await replies == [round, bytes(100_000)]
        feed(reader, b"\r\n", [])


async def test_replies_values_are_handed_over_as_they_arrive() -> None:
    reader, _ = attached()
    seen: list[int] = []

    def on_value(value: bytes | bytearray) -> str:
        seen.append(len(value))
        return f"{len(value)} bytes"

    replies = reader.expect(2, on_value)
    feed(reader, b"*3\r\n$3\r\nabc\r\n$-1\r\n$300000\r\n" + bytes(300_000), [])
    assert seen == [3, 300_000]
    assert not replies.done()
    feed(reader, b"\r\n:7\r\n", [])
    assert await replies == [["3 bytes", None, "300000 bytes"], 7]


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 400\r\n", b":one\r\n", b"$x\r\n", b"+" + bytes(2000), b":1\r\n:2\r\n"]
)
async def test_replies_that_are_none_close_the_connection(data: bytes) -> None:
    reader, transport = attached()
    if data.startswith(b":1"):
        assert (reader.expect(1), feed(reader, data, []))[0].result() == [1]
        assert transport.is_aborted
        return
    replies = reader.expect(1)
    feed(reader, data, [])
    with pytest.raises(RedisConnectionError, match="does not speak"):
        await replies
    assert transport.is_aborted
    assert reader.is_lost


async def test_replies_that_do_not_come_end_with_the_connection() -> None:
    reader, _ = attached()
    replies = reader.expect(1)
    feed(reader, b"$5\r\nab", [])
    reader.connection_lost(None)
    with pytest.raises(RedisConnectionError, match="closed by the server"):
        await replies


async def test_replies_of_a_connection_that_was_lost_while_idle_fail_at_once() -> None:
    reader, _ = attached()
    reader.connection_lost(OSError("reset"))
    with pytest.raises(RedisConnectionError):
        await reader.expect(1)
