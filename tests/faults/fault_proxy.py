"""A TCP proxy that stands for a bad network, or a bad server, between a client and a real Redis.

    client ──► proxy ──► redis-server         two pumps per connection, each holds, drops, or
           ◄──       ◄──                      changes what it carries as the present fault says

What the fault is may change while connections live: what was held goes on when it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from enum import StrEnum
from types import TracebackType
from typing import Self

CHUNK_BYTES = 2**16
MIN_VALUE_BYTES = 256  # of a reply that is taken for a block
START_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0

RETRANSMIT_S = 0.2  # first timeout of TCP, which doubles
MAX_LOSSES = 5  # in a row; then a connection dies


class Fault(StrEnum):
    """What is wrong between client and server."""

    NONE = "none"
    SILENT = "silent"  # connections are accepted, nothing comes through in either direction
    LATE = "late"  # answers come `delay_s` later
    LOSSY = "lossy"  # half of the packets are lost, and sent again as TCP would
    REFUSE = "refuse"  # connections are reset, at once
    CORRUPT = "corrupt"  # some bytes of each block are others
    TRUNCATE = "truncate"  # connections end in the middle of a block


class BulkValues:
    """Finds the values in a stream of RESP2 replies, chunk by chunk."""

    _HEADER = re.compile(rb"\$(\d+)\r\n")

    def __init__(self) -> None:
        self._num_left = 0  # bytes of a value that began in an earlier chunk

    def starts(self, chunk: bytes) -> list[int]:
        """Return the index of the first byte of each value of at least `MIN_VALUE_BYTES`."""
        position = min(self._num_left, len(chunk))
        self._num_left -= position
        found: list[int] = []
        while self._num_left == 0 and (header := self._HEADER.search(chunk, position)):
            length, position = int(header[1]), header.end()
            if length >= MIN_VALUE_BYTES and position < len(chunk):
                found.append(position)
            self._num_left = max(0, position + length - len(chunk))
            position += length
        return found


class FaultProxy:
    """A proxy on a free port, in a thread of its own; a context manager.

    Args:
        port: Of the server behind it, on this machine.
        seed: Of what is lost.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self.port = 0
        self.num_connections = 0  # since start
        self._server_port = port
        self._random = random.Random(seed)
        self._fault, self._delay_s = Fault.NONE, 0.0
        self._changed = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Future[None]] = set()
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self._thread.start()
        serving = asyncio.run_coroutine_threadsafe(self._listen(), self._loop)
        self.port = serving.result(START_TIMEOUT_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(START_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_TIMEOUT_S)
        self._loop.close()

    def switch(self, fault: Fault, delay_s: float = 0.0) -> None:
        """Be faulty in this way from now on, on connections that live too.

        Args:
            fault: `Fault.NONE` passes everything on.
            delay_s: Of `Fault.LATE`.
        """
        asyncio.run_coroutine_threadsafe(self._switch(fault, delay_s), self._loop).result(
            START_TIMEOUT_S
        )

    async def _switch(self, fault: Fault, delay_s: float) -> None:
        self._fault, self._delay_s = fault, delay_s
        self._changed.set()
        self._changed = asyncio.Event()
        if fault is Fault.REFUSE:
            for writer in list(self._writers):
                _reset(writer)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _close(self) -> None:
        self._server.close()
        self._is_closed = True
        for pump in self._pumps:
            pump.cancel()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        if self._fault is Fault.REFUSE or self._is_closed:
            _reset(writer)
            return
        writers = {writer}
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                server = await asyncio.open_connection("127.0.0.1", self._server_port)
            writers.add(server[1])
            self._writers |= writers
            pumps = {
                asyncio.ensure_future(self._pump(reader, server[1], None)),
                asyncio.ensure_future(self._pump(server[0], writer, BulkValues())),
            }
            self._pumps |= pumps
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._pumps -= pumps
        except OSError:  # the server is not there
            pass
        finally:
            self._writers -= writers
            for one in writers:
                one.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        values: BulkValues | None,
    ) -> None:
        """Carry one direction until it ends; `values` is there for that of the replies."""
        while chunk := await reader.read(CHUNK_BYTES):
            starts = values.starts(chunk) if values is not None else []
            if not await self._hold(is_reply=values is not None):
                return
            if starts and self._fault is Fault.TRUNCATE:
                writer.write(chunk[: (starts[0] + len(chunk)) // 2])
                await writer.drain()
                return
            if self._fault is Fault.CORRUPT:
                chunk = _changed(chunk, starts)
            writer.write(chunk)
            await writer.drain()

    async def _hold(self, *, is_reply: bool) -> bool:
        """Wait for as long as the network takes; return whether the connection lives on."""
        while self._fault is Fault.SILENT:
            await self._changed.wait()
        if self._fault is Fault.LATE and is_reply:
            await self._wait_changed(self._delay_s)
        num_losses = 0
        while self._fault is Fault.LOSSY and self._random.random() < 0.5:
            if num_losses == MAX_LOSSES:
                return False
            await self._wait_changed(RETRANSMIT_S * 2**num_losses)
            num_losses += 1
        return True

    async def _wait_changed(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)


def _changed(chunk: bytes, starts: list[int]) -> bytes:
    """Return a chunk in which some bytes of each value are others."""
    changed = bytearray(chunk)
    for start in starts:
        # Behind the frame's header, where only a checksum tells.
        for index in range(start + MIN_VALUE_BYTES // 2, min(start + MIN_VALUE_BYTES, len(chunk))):
            changed[index] ^= 0x7F
    return bytes(changed)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST, which a peer sees as an error rather than an end."""
    endpoint = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
