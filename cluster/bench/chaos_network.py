"""The network between clients and gateways, which can be cut and can stand still.

    client ──► path ──► port of the gateways        a path is a port of its own, so that clients
           ◄──      ◄──                             have several addresses to go on at

What stands still is held, not lost: TCP would send it again. In the clients' own event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

PIECE_BYTES = 2**16
CONNECT_TIMEOUT_S = 2.0


class ClientNetwork:
    """Ways to one server.

    Args:
        host: Of the server.
        port: Of the server.
    """

    def __init__(self, host: str, port: int) -> None:
        self._server_address = (host, port)
        self._listeners: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._passes = asyncio.Event()
        self._passes.set()

    async def start(self, num_paths: int) -> list[str]:
        """Listen; return the address of each path."""
        for _ in range(num_paths):
            self._listeners.append(await asyncio.start_server(self._serve, "127.0.0.1", 0))
        ports = [listener.sockets[0].getsockname()[1] for listener in self._listeners]
        return [f"127.0.0.1:{port}" for port in ports]

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        for writer in list(self._writers):
            _reset(writer)

    def hold(self) -> None:
        """Let nothing pass, either way; connections live on, and new ones are accepted."""
        self._passes.clear()

    def release(self) -> None:
        """Let everything pass again, what was held first."""
        self._passes.set()

    async def close(self) -> None:
        """End it with every connection."""
        for listener in self._listeners:
            listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a callback of a server runs in a task"
        self._tasks.add(task)
        self._writers.add(writer)
        writers = [writer]
        try:
            await self._passes.wait()
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                there, back = await asyncio.open_connection(*self._server_address)
            writers.append(back)
            await self._carry((reader, back), (there, writer))
        except (OSError, asyncio.CancelledError):  # nobody listens, for now; or this is the end
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            for one in writers:
                one.transport.abort()

    async def _carry(self, *ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        pumps = [asyncio.ensure_future(self._pump(*way)) for way in ways]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                await self._passes.wait()
                writer.write(piece)
                await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST, which its peer sees as an error rather than an end."""
    endpoint = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
