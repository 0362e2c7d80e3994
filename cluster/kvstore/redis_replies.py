"""Replies of Redis (RESP2) as they arrive; large values are received where they stay.

    scratch  | $40046\r\n SLkv...... \r\n $1500046\r\n SLkv.. |      small values: copied out of it
                                                      │
    bulk     | SLkv..........  the socket writes here ........ |     the rest of a large one

A reader that buffers copies each byte three times on its way (stream, parser, value), which costs
more than the kernel's own copy and is what limits the fetching of KV blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

SCRATCH_BYTES = 2**18  # of one read at most
_MIN_DIRECT_BYTES = 2**16  # missing from a value: fewer are not worth a read of their own

_MAX_LINE_BYTES = 1024  # of a number, a state, or the text of an error

OnValue = Callable[[bytes | bytearray], Any]


class ReplyReader(asyncio.BufferedProtocol):
    """Receives the replies of one connection.

    Texts and numbers come as bytes and integers, values as bytes or, if large, as bytearray;
    errors are `ResponseError` values. What is not RESP2 closes the connection.
    """

    def __init__(self) -> None:
        self.is_lost = False
        self.on_lost: Callable[[], None] | None = None  # called once, when the connection is lost
        self._transport: asyncio.Transport | None = None
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._start = 0  # of what is not parsed yet
        self._end = 0
        self._bulk: bytearray | None = None  # a value that is being received
        self._bulk_end = 0  # of its part that is there
        self._num_skipped = 0  # bytes to pass over: the end of such a value's line
        self._arrays: list[tuple[int, list[Any]]] = []  # begun: full length, what is there
        self._replies: list[Any] = []
        self._num_expected = 0
        self._on_value: OnValue | None = None
        self._waiter: asyncio.Future[list[Any]] | None = None

    def attach(self, transport: asyncio.Transport) -> None:
        """Read from a transport from now on; nothing may be on its way."""
        self._transport = transport
        transport.set_protocol(self)

    def expect(
        self, num_replies: int, on_value: OnValue | None = None
    ) -> asyncio.Future[list[Any]]:
        """Return a future of the next replies, in order; one at a time.

        It fails with `RedisConnectionError` when the connection is lost.

        Args:
            num_replies: At least 1.
            on_value: What it makes of a value stands in its place. It is called as each arrives:
                the value is in the processor's cache then, and the next one is on its way.
        """
        self._on_value = on_value
        assert not self._replies and not self._num_expected, "replies are on their way"
        self._num_expected = num_replies
        self._waiter = asyncio.get_running_loop().create_future()
        if self.is_lost:
            self._waiter.set_exception(RedisConnectionError("the connection is closed"))
        return self._waiter

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the socket writes next."""
        if self._bulk is not None:
            return memoryview(self._bulk)[self._bulk_end :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start and self._end > SCRATCH_BYTES // 2:  # a short read costs as much as a long
            rest = bytes(self._scratch[self._start : self._end])
            self._scratch[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._scratch[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take in what the socket wrote."""
        try:
            if self._bulk is None:
                self._end += nbytes
            else:
                self._take_bulk(nbytes)
            while self._bulk is None and self._parse_one():
                pass
        except ValueError:
            self._lose(RedisConnectionError("the server does not speak as Redis does"))

    def connection_lost(self, exc: Exception | None) -> None:
        """End what is waited for."""
        self._lose(RedisConnectionError(str(exc) if exc else "closed by the server"))
        on_lost, self.on_lost = self.on_lost, None
        if on_lost is not None:
            on_lost()

    def _lose(self, error: Exception) -> None:
        self.is_lost = True
        if self._transport is not None:
            self._transport.abort()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    def _take_bulk(self, num_bytes: int) -> None:
        self._bulk_end += num_bytes
        if self._bulk is not None and self._bulk_end == len(self._bulk):
            value, self._bulk = self._bulk, None
            self._num_skipped = 2
            self._add_value(value)

    def _parse_one(self) -> bool:
        """Take the next line, with its value, out of the scratch; return whether there was one."""
        skipped = min(self._num_skipped, self._end - self._start)
        self._start += skipped
        self._num_skipped -= skipped
        there = bytes(self._scratch[self._start : min(self._start + _MAX_LINE_BYTES, self._end)])
        line_end = there.find(b"\r\n")
        if line_end < 0:
            if len(there) == _MAX_LINE_BYTES:
                raise ValueError("a line without an end")
            return False
        line = there[:line_end]
        body = self._start + line_end + 2
        kind, text = line[:1], line[1:]
        if kind == b"$" and int(text) >= 0:
            return self._parse_value(body, int(text))
        self._start = body
        if kind == b"*" and int(text) > 0:
            self._arrays.append((int(text), []))
        else:
            self._add(_simple(kind, text))
        return True

    def _parse_value(self, body: int, num_bytes: int) -> bool:
        """Take a value that begins at `body`; return False where it has to be received first."""
        there = self._end - body
        if there >= num_bytes:
            self._start = min(body + num_bytes + 2, self._end)
            self._num_skipped = body + num_bytes + 2 - self._start
            self._add_value(bytes(self._scratch[body : body + num_bytes]))
            return True
        if num_bytes - there >= _MIN_DIRECT_BYTES or body - self._start + num_bytes > SCRATCH_BYTES:
            self._bulk = bytearray(num_bytes)
            self._bulk[:there] = self._scratch[body : self._end]
            self._bulk_end = there
            self._start = self._end = 0
        return False

    def _add_value(self, value: bytes | bytearray) -> None:
        self._add(value if self._on_value is None else self._on_value(value))

    def _add(self, value: Any) -> None:
        while self._arrays:
            length, array = self._arrays[-1]
            array.append(value)
            if len(array) < length:
                return
            self._arrays.pop()
            value = array
        self._replies.append(value)
        if len(self._replies) == self._num_expected and self._waiter is not None:
            replies, self._replies, self._num_expected = self._replies, [], 0
            if not self._waiter.done():
                self._waiter.set_result(replies)
        elif len(self._replies) > self._num_expected:
            raise ValueError("a reply to nothing")


def _simple(kind: bytes, text: bytes) -> Any:
    if kind == b"+":
        return text
    if kind == b":":
        return int(text)
    if kind == b"-":
        return ResponseError(text.decode(errors="replace"))
    if kind == b"*":
        return [] if text == b"0" else None
    if kind == b"$":
        return None
    raise ValueError("an unknown kind of reply")
