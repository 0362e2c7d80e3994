"""A bad network between a mover and Redis, in a process of its own; orders come on standard input.

    pass           what arrives is sent on
    black_hole     connections are accepted, nothing is sent on and nothing answered
    delay SECONDS  every piece is sent on so much later
    drop SHARE     of the pieces get lost, whatever follows them

TCP would send a lost packet again. Here it is gone: what follows is out of step, as after a
middlebox that forgets half of a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import cluster
from cluster.errors import UnavailableError

PIECE_BYTES = 2**16
_END_TIMEOUT_S = 2.0


class NetworkProxy:
    """One listener before one server.

    Args:
        port: Of the server, on this machine.
        seed: Of what gets lost.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self._port = port
        self._random = random.Random(seed)
        self._mode, self._value = "pass", 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen; return the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def order(self, text: str) -> None:
        """Change what happens to every piece from now on.

        Raises:
            ValueError: It is no order.
        """
        mode, _, value = text.partition(" ")
        if mode not in ("pass", "black_hole", "delay", "drop"):
            raise ValueError(f"no order: {text!r}")
        self._mode, self._value = mode, float(value or 0.0)

    async def close(self) -> None:
        """End every connection."""
        assert self._server is not None, "it was started"
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a callback of a server runs in a task"
        self._tasks.add(task)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        else:
            ends = (self._pump(reader, back), self._pump(there, writer))
            pumps = [asyncio.ensure_future(end) for end in ends]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                writer.transport.abort()
                back.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                if self._mode == "delay":
                    await asyncio.sleep(self._value)
                if self._is_lost():
                    continue
                writer.write(piece)
                await writer.drain()

    def _is_lost(self) -> bool:
        if self._mode == "drop":
            return self._random.random() < self._value
        return self._mode == "black_hole"


class ProxyProcess:
    """A `NetworkProxy` in a process that shares no interpreter with what is measured.

    Args:
        port: Of the server.

    Raises:
        UnavailableError: It did not start.
    """

    def __init__(self, port: int) -> None:
        root = str(Path(cluster.__file__).parents[1])
        known = os.environ.get("PYTHONPATH")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.bench.store_proxy", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([root, known] if known else [root])},
        )
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise UnavailableError("the proxy of the benchmark did not start")
        self.port = int(line)

    def order(self, text: str) -> None:
        """Change what the network does, as `NetworkProxy.order`."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End it, and every connection."""
        try:
            self._process.communicate(timeout=_END_TIMEOUT_S)  # closes its input: it ends by itself
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


async def _main(port: int) -> None:
    proxy = NetworkProxy(port)
    print(await proxy.start(), flush=True)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    while line := await orders.readline():
        proxy.order(line.decode().strip())
    await proxy.close()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
