"""A real redis-server on a free port, for tests and experiments."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

START_TIMEOUT_S = 10.0
NUM_ATTEMPTS = 3  # another process may take the free port first


class RedisServer:
    """A server without persistence; a context manager that ends it by its own process id.

    Args:
        options: More of redis-server's command line, as ``("--requirepass", "secret")``.

    Raises:
        FileNotFoundError: redis-server is not installed.
        RuntimeError: It did not start; the text is its log.
    """

    def __init__(self, options: tuple[str, ...] = ()) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def __enter__(self) -> Self:
        if shutil.which("redis-server") is None:
            raise FileNotFoundError("redis-server is not installed: apt-get install redis-server")
        self._folder = tempfile.TemporaryDirectory(prefix="sluice-redis-")
        for attempt in range(NUM_ATTEMPTS):
            self.port = free_port()
            try:
                self.start()
                return self
            except RuntimeError:
                if attempt == NUM_ATTEMPTS - 1:
                    self._folder.cleanup()
                    raise
        raise AssertionError("unreachable")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        if self._folder is not None:
            self._folder.cleanup()

    def start(self) -> None:
        """Start the server, empty, on `port`, and return when it answers."""
        assert self._folder is not None, "use it in a with statement"
        log = Path(self._folder.name) / "redis.log"
        network = ("--port", str(self.port), "--bind", "127.0.0.1")
        memory_only = ("--save", "", "--appendonly", "no")
        files = ("--dir", self._folder.name, "--logfile", str(log))
        self._process = subprocess.Popen(
            ["redis-server", *network, *memory_only, *files, *self._options]
        )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                raise RuntimeError(f"redis-server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.01)

    @property
    def folder(self) -> Path:
        """Where its files are; gone with the server."""
        assert self._folder is not None, "use it in a with statement"
        return Path(self._folder.name)

    def kill(self) -> None:
        """End the server as a crash would, with all that it holds; ended already is fine."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                reply = connection.recv(64)
        except OSError:
            return False
        return reply.startswith((b"+PONG", b"-NOAUTH"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
